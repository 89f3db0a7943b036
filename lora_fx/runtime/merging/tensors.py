"""Every tensor that merged adapters change, and whether it can be used."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import merged
from lora_fx.adapters.weights.merged import Merged
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.exact import exact_products
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.packed import packing_of, plain_dtype, unpacked
from lora_fx.runtime.merging import program as merge_program


@exact_products()
def merged_tensors(model: nn.Module, adapters: Sequence[str], progressbar: bool = False) -> Merged:
    """Return the tensors of every module that these adapters change, each computed once.

    Modules that share a weight, and the adapter, get one tensor. Of a weight in 4 or 8 bits they
    are in the dtype that the model is in elsewhere, float32 if it is packed all over.
    """
    found: dict[nn.Module, dict[str, Tensor]] = {}
    made: dict[int, Tensor] = {}
    sites = [site for _, site in storage.sites(model)]
    shown = Console(stderr=True)
    for site in track(sites, "Merging", console=shown, disable=not progressbar):
        here = [adapter for adapter in adapters if adapter in site.lora_branches]
        if here and not any(site.lora_branches[name].tied for name in here):
            module, weight = site.lora_place
            results = _merged(model, site, adapters)
            found.setdefault(module, {}).update(results)
            made[id(merged.weight_for(site, adapters))] = results[weight]
    for site in sites:
        module, weight = site.lora_place
        here = any(adapter in site.lora_branches for adapter in adapters)
        if here and weight not in found.get(module, {}):
            found[module] = {weight: made[id(merged.weight_for(site, adapters))]}
    return found


def _merged(model: nn.Module, site: Site, adapters: Sequence[str]) -> dict[str, Tensor]:
    if packing_of(site) is None:
        return merge_program.run(site, adapters)
    values = unpacked(site)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    dtype = plain_dtype(model) or torch.float32
    merged = merge_program.run(site, adapters, wide)
    return {name: tensor.to(dtype) for name, tensor in merged.items()}


def require_finite(model: nn.Module, results: Merged) -> None:
    """Raise LoraFxError naming the merged tensors that hold NaN or infinity."""
    faults = [
        Diagnostic(
            "merge-not-finite",
            f"merged, `{numberless(fqn)}.{name}` would hold NaN or infinity",
            help="merge in a wider dtype, or look for the adapter whose values are not finite",
        )
        for fqn, module in storage.base_modules(model, itself=True).items()
        for name, tensor in results.get(module, {}).items()
        if not is_finite(tensor)
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; of one on meta nothing is known."""
    if tensor.is_meta or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
