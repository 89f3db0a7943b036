"""Merges into the base: what must hold of the weights that they change."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.alike import once_each
from lora_fx.plan.modules import Modules
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import MergeSpec


def base_merge_faults(
    merges: Sequence[MergeSpec],
    adapters: Sequence[AdapterPlan],
    quantized: Collection[str],
    modules: Modules,
) -> list[Diagnostic]:
    """Refuse to change a weight that other modules share, and one that is packed, unasked.

    What `tie` adapts in all of the modules that share a weight may be merged into it once.
    `quantized` are the modules that the spec quantises; those that come so are found. `merges` come
    each after those that it takes from.
    """
    sharing = modules_sharing(modules)
    packed = {*quantized, *packed_modules(modules)}
    sources: dict[str, set[str]] = {adapter.name: {adapter.name} for adapter in adapters}
    faults = []
    for merge in merges:
        sources[merge.name] = {
            name for term in merge.mix.terms for name in sources.get(term.name, ())
        }
        if merge.into_base:
            for adapter in adapters:
                if adapter.name in sources[merge.name]:
                    faults += _faults(merge, adapter, packed, sharing, modules)
    return once_each(faults)


def _faults(
    merge: MergeSpec,
    adapter: AdapterPlan,
    packed: set[str],
    sharing: dict[str, list[str]],
    modules: Modules,
) -> Iterator[Diagnostic]:
    for site in adapter.sites:
        others = sharing.get(site.name, [])
        if others and not site.tie:
            yield _shared(merge, site, others[0], modules)
        if site.layer.groups > 1:
            yield Diagnostic(
                "cannot-apply",
                f"merge `{merge.name}` goes into a convolution with groups",
                merge.span,
                f"`{site.name}` has {site.layer.groups}, and the adapter sees the inputs of all",
                ((site.rule, "adapted here"),),
                help="merge into an adapter: leave `into = base` out",
            )
        if site.fqn in packed and not merge.dequantize:
            yield Diagnostic(
                "cannot-apply",
                f"merge `{merge.name}` goes into weights that are stored in 4 or 8 bits",
                merge.span,
                f"`{site.name}`",
                ((site.rule, "adapted here"),),
                help="write `into = base(dequantize = true)`; what is merged into is not "
                "quantised any more then",
            )


def _shared(merge: MergeSpec, site: SitePlan, other: str, modules: Modules) -> Diagnostic:
    replicated = modules.place(site.name) is not None and modules.place(other) is not None
    help = "write `tie = true` in the target, so that they share the adapter too"
    if replicated:
        help = "write `share = nothing` in `layers`, so that copies have weights of their own"
    return Diagnostic(
        "cannot-apply",
        f"merge `{merge.name}` goes into weights that several modules share",
        merge.span,
        f"that of `{site.name}` is also `{other}`'s",
        ((site.rule, "adapted here"),),
        help=help,
    )


def packed_modules(modules: Modules) -> Iterator[str]:
    """Yield the modules whose weights are stored in 4 or 8 bits."""
    for fqn, module in modules.by_fqn.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and _is_packed(weight):
            yield fqn


def _is_packed(weight: Tensor) -> bool:
    of_bytes = weight.dtype.itemsize == 1 or not weight.is_floating_point()
    return of_bytes or getattr(weight, "quant_state", None) is not None


def modules_sharing(modules: Modules) -> dict[str, list[str]]:
    """Return the other modules that have the same weight, by module, and so for parameters."""
    names: dict[int, list[str]] = {}
    for name, parameter in modules.parameters.items():
        names.setdefault(id(parameter), []).append(name)
    shared: dict[str, list[str]] = {}
    for group in names.values():
        for name in group if len(group) > 1 else ():
            others = [other.removesuffix(".weight") for other in group if other != name]
            shared[name] = shared[name.removesuffix(".weight")] = others
    return shared
