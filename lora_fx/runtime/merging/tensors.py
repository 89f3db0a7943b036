"""Every tensor that merged adapters change, and whether it can be used."""

from collections.abc import Iterable, Sequence
from itertools import chain

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
from lora_fx.runtime.merging.run import run
from lora_fx.runtime.merging.together import run_together


@exact_products()
def merged_tensors(model: nn.Module, adapters: Sequence[str], progressbar: bool = False) -> Merged:
    """Return the tensors of every module that these adapters change, each computed once.

    Modules that share a weight, and the adapter, get one tensor. Of a weight in 4 or 8 bits they
    are in the dtype that the model is in elsewhere, float32 if it is packed all over.
    """
    found: dict[nn.Module, dict[str, Tensor]] = {}
    made: dict[int, Tensor] = {}
    sites = [site for _, site in storage.sites(model)]
    here = [site for site in sites if any(name in site.lora_branches for name in adapters)]
    tied = [site for site in here if _is_tied(site, adapters)]
    own = [site for site in here if site not in tied]
    plain = [site for site in own if packing_of(site) is None]
    packed = [site for site in own if packing_of(site) is not None]
    wide = ((site, _unpacked(model, site, adapters)) for site in packed)
    results: Iterable[tuple[Site, dict[str, Tensor]]]
    results = chain(run_together(plain, adapters), wide)
    if progressbar:
        results = track(results, "Merging", len(own), console=Console(stderr=True))
    for site, tensors in results:
        module, weight = site.lora_place
        found.setdefault(module, {}).update(tensors)
        if tied:
            made[id(merged.weight_for(site, adapters))] = tensors[weight]
    for site in tied:
        module, weight = site.lora_place
        if weight not in found.get(module, {}):
            found[module] = {weight: made[id(merged.weight_for(site, adapters))]}
    return found


def _is_tied(site: Site, adapters: Sequence[str]) -> bool:
    return any(site.lora_branches[name].tied for name in adapters if name in site.lora_branches)


def _unpacked(model: nn.Module, site: Site, adapters: Sequence[str]) -> dict[str, Tensor]:
    values = unpacked(site)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    dtype = plain_dtype(model) or torch.float32
    return {name: tensor.to(dtype) for name, tensor in run(site, adapters, wide).items()}


def require_finite(model: nn.Module, results: Merged) -> None:
    """Raise LoraFxError naming the merged tensors that hold NaN or infinity."""
    found = [
        (fqn, name, tensor)
        for fqn, module in storage.base_modules(model, itself=True).items()
        for name, tensor in results.get(module, {}).items()
    ]
    faults = [
        Diagnostic(
            "merge-not-finite",
            f"merged, `{numberless(fqn)}.{name}` would hold NaN or infinity",
            help="merge in a wider dtype, or look for the adapter whose values are not finite",
        )
        for (fqn, name, _), finite in zip(
            found, are_finite([tensor for *_, tensor in found]), strict=True
        )
        if not finite
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return whether each holds neither NaN nor infinity; of one on meta nothing is known.

    A device is waited for once.
    """
    finite = [True] * len(tensors)
    within: dict[torch.device, dict[int, Tensor]] = {}
    for place, tensor in enumerate(tensors):
        if not tensor.is_meta and tensor.numel():
            of_device = within.setdefault(tensor.device, {})
            known = torch.stack(torch.aminmax(tensor)).isfinite().all()
            whole = getattr(known, "full_tensor", None)  # of a sharded one, all its parts'
            of_device[place] = known if whole is None else whole()
    for of_device in within.values():
        answers = torch.stack(list(of_device.values())).tolist()
        for place, one in zip(of_device, answers, strict=True):
            finite[place] = one
    return finite
