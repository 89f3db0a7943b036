"""Refuse to merge where the result could not be held, or would be another module's too."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.sites.layer import is_convolution
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.merged import changed_by, weight_for
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.offloaded import offload_hook
from lora_fx.plan.packed import packing_of
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.stacks import find_stacks, place_of

_WHY = {"alora": "acts on some tokens of a sample, and a weight on all"}
_Sharing = Mapping[int, Sequence[tuple[str, nn.Module, str]]]


def require_mergeable(model: nn.Module, adapters: Sequence[str], dequantize: bool = False) -> None:
    """Raise LoraFxError naming every reason why these adapters cannot be merged together.

    Weights in 4 or 8 bits are one, unless they are to be dequantised.
    """
    sharing: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for fqn, module in storage.base_modules(model, itself=True).items():
        for name in module._parameters:
            place = fqn, module, name
            sharing.setdefault(id(copies.base_tensor(module, name)), []).append(place)
    faults = [
        fault
        for fqn, site in storage.sites(model)
        if any(adapter in site.lora_branches for adapter in adapters)
        for fault in (
            *_faults(fqn, site, adapters, dequantize),
            *_shared(model, fqn, site, adapters, sharing),
        )
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def require_variants(plans: Iterable[AdapterPlan], known: Container[str]) -> None:
    """Raise LoraFxError if an adapter is of a variant that is not among those that are known."""
    faults = [
        Diagnostic(
            "cannot-merge",
            f"`{plan.name}` is `{site.variant.name}` at `{numberless(site.name)}`, which "
            + _WHY.get(site.variant.name, "cannot be merged yet"),
            help="leave it unmerged",
        )
        for plan in plans
        for site in plan.sites
        if site.variant.name not in known
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def require_separate(model: nn.Module, active: Sequence[str], merged: Sequence[str]) -> None:
    """Raise LoraFxError if an active adapter trains what merged ones are folded into.

    Or has norms of it (DoRA), which are of the base's own weight.
    """
    others = [adapter for adapter in active if adapter not in merged]
    for fqn, site in storage.sites(model):
        changed = [(name, adapter) for adapter in merged for name in changed_by(site, adapter)]
        for name, adapter in changed:
            for other in others:
                branch = site.lora_branches.get(other)
                if branch is not None and branch.magnitude is not None:
                    message = f"`{other}` has norms of `{fqn}`, which `{adapter}` is merged into"
                    help = "call `unmerge_adapter()` first"
                    raise LoraFxError((Diagnostic("adapter-conflict", message, help=help),))
                module, _ = site.lora_place
                if token_rows.rows_of(module, other):
                    message = f"`{other}` has rows of `{fqn}`, which `{adapter}` is merged into"
                    help = "call `unmerge_adapter()` first"
                    raise LoraFxError((Diagnostic("adapter-conflict", message, help=help),))
                if copies.has(module, other) and name in copies.tensors(module, other):
                    where = fqn if module is not site else f"{fqn}.{name}"
                    message = f"`{other}` trains `{where}`, and `{adapter}` is merged into it"
                    help = "call `unmerge_adapter()` first"
                    raise LoraFxError((Diagnostic("adapter-conflict", message, help=help),))


def _faults(
    fqn: str, site: Site, adapters: Sequence[str], dequantize: bool
) -> Iterator[Diagnostic]:
    name, weight = numberless(fqn), weight_for(site, adapters)
    if offload_hook(site.lora_place[0]) is not None:
        message = f"the weight of `{name}` is offloaded, and a merged one has no place there"
        yield Diagnostic("cannot-merge", message, help="load the model without offloading")
    elif _is_packed(site, weight) and not (dequantize and packing_of(site) is not None):
        message = f"the weight of `{name}` is stored in 4 or 8 bits"
        help = "`merge_and_unload(dequantize=True)` makes it a plain one"
        if packing_of(site) is None:
            help = "save the adapter, and load it over the base in 16 or 32 bits"
        yield Diagnostic("cannot-merge", message, help=help)
    groups = _groups(site)
    if groups > 1:
        message = f"`{name}` has {groups} groups, and an adapter there sees all its inputs"
        help = "leave the adapter unmerged: no grouped weight computes the same"
        yield Diagnostic("cannot-merge", message, help=help)
    for adapter in adapters:
        if token_rows.rows_of(site, adapter):
            message = f"`{adapter}` has rows of `{name}`, to which its adapters add"
            help = "leave it unmerged: merged, the rows would be without what is added to them"
            yield Diagnostic("cannot-merge", message, help=help)
        if "bias" in changed_by(site, adapter) and site.bias is None:
            message = f"`{name}` has no bias to merge that of `{adapter}` into"
            help = "leave the adapter unmerged, or train one without `lora_bias`"
            yield Diagnostic("cannot-merge", message, help=help)


def _is_packed(site: Site, weight: Tensor) -> bool:
    in_bytes = weight.dtype.itemsize == 1 or not weight.is_floating_point()
    return in_bytes or packing_of(site) is not None


def _groups(module: nn.Module) -> int:
    return module.groups if is_convolution(module) else 1


def _shared(
    model: nn.Module, fqn: str, site: Site, adapters: Sequence[str], sharing: _Sharing
) -> Iterator[Diagnostic]:
    """Yield a fault if another module has the weight and is not adapted with it."""
    here, own = site.lora_place
    for name, other, weight in sharing[id(copies.base_tensor(here, own))]:
        elsewhere = other is not here or weight != own
        if elsewhere and not _tied(site, storage.site_of(other, weight), adapters):
            name = name if weight == "weight" else f"{name}.{weight}"
            yield Diagnostic("cannot-merge", _of_both(fqn, name), help=_remedy(model, fqn, name))


def _tied(one: Site, other: Site | None, adapters: Sequence[str]) -> bool:
    """Whether these adapters adapt both modules as the one weight that they share."""
    here = [adapter for adapter in adapters if adapter in one.lora_branches]
    return (
        other is not None
        and all(name in other.lora_branches for name in here)
        and all(one.lora_branches[name].A is other.lora_branches[name].A for name in here)
        and weight_for(one, adapters) is weight_for(other, adapters)
    )


def _of_both(one: str, other: str) -> str:
    if numberless(one) == numberless(other):
        return f"layers share the weight of `{numberless(one)}`"
    return f"the weight of `{one}` is also `{other}`'s"


def _remedy(model: nn.Module, fqn: str, other: str) -> str:
    stacks = find_stacks(model)
    if place_of(fqn, stacks) is not None and place_of(other, stacks) is not None:
        return "write `share = nothing` in `layers`, so that copies have weights of their own"
    return "write `tie = true` in the target, so that they share the adapter too"
