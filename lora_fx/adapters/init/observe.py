"""What a model does with a sample of data, as inits need it: covariances and gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.init.batches import Batches, as_it_was, data_fault, on_device
from lora_fx.plan.sites import SitePlan

Observed = Mapping[tuple[str, str], Tensor]  # by adapter and fqn


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
    with as_it_was(model), ExitStack() as hooks, torch.set_grad_enabled(bool(gradients)):
        for one in running:
            module = model.get_submodule(one.site.fqn)
            hooks.callback(module.register_forward_hook(one.see, with_kwargs=False).remove)
        for fqn in gradients:
            model.get_parameter(f"{fqn}.weight").requires_grad_(True)
        for batch in batches:
            count += 1
            given = on_device(batch, model)
            for one in running:
                one.mask = given.get("attention_mask")
            result = model(**given)
            if gradients:
                _loss(result).backward()
                for fqn, gradient in gradients.items():
                    gradient.take(model.get_submodule(fqn))
    if not count:
        raise data_fault("there is no batch in the data", None)
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


def _loss(result: Any) -> Tensor:
    loss = getattr(result, "loss", None)
    if not isinstance(loss, Tensor):
        raise data_fault("init `lora_ga` needs a loss", "give the batches `labels`")
    return loss


def _checked(value: Tensor | None, site: SitePlan) -> Tensor:
    if value is None:
        raise data_fault(f"no batch reaches `{site.name}`", "leave it out, or give other data")
    if not value.isfinite().all():
        raise data_fault(f"what `{site.name}` sees of the data is not finite", None)
    return value
