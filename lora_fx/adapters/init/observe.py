"""What a model does with a sample of data, as inits need it: covariances and gradients.

A batch is a mapping of the arguments of the model's `forward`. The model runs as it is, without
adapters, in evaluation mode: dropout would draw other numbers each time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.sites import SitePlan

Batches = Iterable[Mapping[str, Any]]
Observed = Mapping[tuple[str, str], Tensor]  # by adapter and fqn
OF_DATA = frozenset({"corda", "lora_ga"})


def observe(model: nn.Module, sites: Sequence[SitePlan], batches: Batches) -> Observed:
    """Return what the inits of these sites need of the data; the model is as it was afterwards.

    For `corda` the covariance (in, in) of a layer's inputs, for `lora_ga` the mean gradient of the
    loss by its weight (out, in). Raises LoraFxError if there are no batches, no loss in them for
    `lora_ga`, numbers that are not finite, or a layer that none of them reaches.
    """
    gradients = {site.fqn: _Gradient(site) for site in sites if site.init.name == "lora_ga"}
    sums = {
        (site.adapter, site.fqn): _Covariance(site) if site.init.name == "corda" else None
        for site in sites
    }
    running = [one for one in sums.values() if one is not None]
    count = 0
    with _as_it_was(model), ExitStack() as hooks, torch.set_grad_enabled(bool(gradients)):
        for one in running:
            module = model.get_submodule(one.site.fqn)
            hooks.callback(module.register_forward_hook(one.see, with_kwargs=False).remove)
        for fqn in gradients:
            model.get_parameter(f"{fqn}.weight").requires_grad_(True)
        for batch in batches:
            count += 1
            given = _on_device(batch, model)
            for one in running:
                one.mask = given.get("attention_mask")
            result = model(**given)
            if gradients:
                _loss(result).backward()
                for fqn, gradient in gradients.items():
                    gradient.take(model.get_submodule(fqn))
    if not count:
        raise _fault("there is no batch in the data", None)
    found = {key: one if one is not None else gradients[key[1]] for key, one in sums.items()}
    return {key: _checked(one.mean(), one.site) for key, one in found.items()}


class _Covariance:
    """Σ Xᵀ X over samples, each divided by its largest element; padded tokens are left out."""

    def __init__(self, site: SitePlan) -> None:
        self.site = site
        self.mask: Tensor | None = None
        self._whole = site.init.argument("use_float16_for_covariance") is not True
        self._sum: Tensor | None = None
        self._samples = 0

    def see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0].detach()
        for rows in _samples(x.float() if self._whole else x, self.mask):
            rows = rows / rows.max().abs().clamp(min=torch.finfo(rows.dtype).tiny)
            product = rows.T @ rows
            self._sum = product if self._sum is None else self._sum + product
            self._samples += 1

    def mean(self) -> Tensor | None:
        return None if self._sum is None else self._sum / self._samples


class _Gradient:
    """Σ of a weight's gradients, (out, in) in float32."""

    def __init__(self, site: SitePlan) -> None:
        self.site = site
        self._sum: Tensor | None = None
        self._batches = 0

    def take(self, module: nn.Module) -> None:
        weight = module.get_parameter("weight")
        if weight.grad is None:
            return
        gradient = weight.grad.float()
        self._sum = gradient if self._sum is None else self._sum + gradient
        self._batches += 1
        weight.grad = None

    def mean(self) -> Tensor | None:
        if self._sum is None:
            return None
        mean = self._sum / self._batches
        return mean if self.site.layer.kind == "linear" else mean.T


def _samples(x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Yield the inputs (tokens, in) of each sample that has any."""
    if x.ndim == 3 and mask is not None and mask.shape == x.shape[:2]:
        rows = [one[kept.bool()] for one, kept in zip(x, mask, strict=True)]
    else:
        rows = list(x) if x.ndim == 3 else [x.reshape(-1, x.shape[-1])]
    yield from (one for one in rows if len(one))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode; afterwards put back modes and what needs gradients."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in flags:
            parameter.grad = None
            parameter.requires_grad_(needed)


def _on_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise _fault(f"a batch is a `{kind}`, no mapping of the arguments of the model", None)
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _loss(result: Any) -> Tensor:
    loss = getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise _fault("init `lora_ga` needs a loss", "give the batches `labels`")
    return loss


def _checked(value: Tensor | None, site: SitePlan) -> Tensor:
    if value is None:
        raise _fault(f"no batch reaches `{site.name}`", "leave it out, or give other data")
    if not value.isfinite().all():
        raise _fault(f"what `{site.name}` sees of the data is not finite", None)
    return value


def _fault(message: str, help: str | None) -> LoraFxError:
    return LoraFxError((Diagnostic("calibration-data", message, help=help),))
