"""Where a site keeps an adapter's tensors. No other file knows the layout."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.site import Arithmetic, Site


def mark(module: nn.Linear) -> Site:
    """Make a linear module a site without adapters, in place; a site is returned as it is."""
    if isinstance(module, Site):
        return module
    specialise(module, Site)
    site: Site = module  # type: ignore[assignment]
    site.lora_A = nn.ModuleDict().train(site.training)
    site.lora_B = nn.ModuleDict().train(site.training)
    site.lora_arithmetic = {}
    site.activate(())
    return site


def sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    """Yield every site of the model with its fqn, in module order."""
    for fqn, module in model.named_modules():
        if isinstance(module, Site):
            yield fqn, module


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model by fqn, without what sites keep inside."""
    inside = tuple(f"{fqn}.lora_" for fqn, _ in sites(model))
    return {f: module for f, module in model.named_modules() if f and not f.startswith(inside)}


def insert(
    site: Site, adapter: str, tensors: Mapping[str, Tensor], arithmetic: Arithmetic, trainable: bool
) -> None:
    """Store an adapter at a site; `tensors` as `tensors()` returns them. It is not activated."""
    site.lora_A[adapter] = _factor(tensors["lora_A.weight"], trainable).train(site.training)
    site.lora_B[adapter] = _factor(tensors["lora_B.weight"], trainable).train(site.training)
    site.lora_arithmetic[adapter] = arithmetic


def remove(site: Site, adapter: str) -> None:
    """Delete an adapter's tensors from a site; it must not be active."""
    del site.lora_A[adapter], site.lora_B[adapter], site.lora_arithmetic[adapter]


def tensors(site: Site, adapter: str) -> dict[str, nn.Parameter]:
    """Return the adapter's parameters at a site in PEFT's shapes: A (r, in), B (out, r)."""
    return {
        "lora_A.weight": site.lora_A[adapter].weight,  # type: ignore[dict-item]
        "lora_B.weight": site.lora_B[adapter].weight,  # type: ignore[dict-item]
    }


def _factor(weight: Tensor, trainable: bool) -> nn.Linear:
    rows, columns = weight.shape
    factor = nn.Linear(columns, rows, bias=False, device="meta")
    factor.weight = nn.Parameter(weight, requires_grad=trainable)
    return factor


def base_device(site: Site) -> torch.device:
    """Return the device of the base weight."""
    return site.weight.device  # type: ignore[return-value]


@torch.no_grad()
def overwrite(
    site: Site, adapter: str, values: Mapping[str, Tensor], arithmetic: Arithmetic
) -> None:
    """Copy values of equal shapes into an adapter that is there; its parameters stay the same."""
    for name, parameter in tensors(site, adapter).items():
        parameter.copy_(values[name])
    site.lora_arithmetic[adapter] = arithmetic
