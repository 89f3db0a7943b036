"""Weights in 4 or 8 bits that a merge into the base makes plain: `base(dequantize = true)`."""

from collections.abc import Iterator, Mapping, Sequence

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.alike import once_each
from lora_fx.plan.base_merges import packed_modules
from lora_fx.plan.modules import Modules
from lora_fx.plan.packed import packing_of
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import MergeSpec

Dequantized = Mapping[str, QuantizedModule | None]


def dequantized_modules(
    merges: Sequence[MergeSpec],
    adapters: Sequence[AdapterPlan],
    quantized: Mapping[str, QuantizedModule],
    modules: Modules,
) -> Dequantized:
    """Return the modules that are not packed any more once the merges are done, by fqn.

    Each with what the spec packs it in while they are done; None for one that came packed.
    """
    packed = {*quantized, *packed_modules(modules)}
    sites = (site for _, site in _merged(merges, adapters) if site.fqn in packed)
    return {site.fqn: quantized.get(site.fqn) for site in sites}


def dequantized_faults(
    merges: Sequence[MergeSpec],
    adapters: Sequence[AdapterPlan],
    dequantized: Dequantized,
    modules: Modules,
) -> list[Diagnostic]:
    """Refuse packed weights that are not bitsandbytes', and what an init left and `quantize` packs.

    What was packed there is not the base's weight, and only the model that was trained has it.
    """
    faults = []
    for merge, site in _merged(merges, adapters):
        if site.fqn not in dequantized:
            continue
        if dequantized[site.fqn] is None and packing_of(modules.by_fqn[site.fqn]) is None:
            message = f"merge `{merge.name}` goes into weights that bitsandbytes has not packed"
            help = "merge into the base in 16 or 32 bits"
            faults.append(_fault(merge, site, message, help))
        if dequantized[site.fqn] is not None and site.changes_base:
            what = f"variant `{site.variant.name}`"
            if site.variant.name != "kasa":
                what = f"init `{site.init.name}`"
            message = f"merge `{merge.name}` goes into weights that are packed without what {what}"
            help = "leave `quantize` out, or call `merge_and_unload(dequantize=True)` once trained"
            faults.append(_fault(merge, site, f"{message} takes out", help))
    return once_each(faults)


def _fault(merge: MergeSpec, site: SitePlan, message: str, help: str) -> Diagnostic:
    label, adapted = f"`{site.name}`", ((site.rule, "adapted here"),)
    return Diagnostic("cannot-apply", message, merge.span, label, adapted, help=help)


def _merged(
    merges: Sequence[MergeSpec], adapters: Sequence[AdapterPlan]
) -> Iterator[tuple[MergeSpec, SitePlan]]:
    """Yield every site that a merge into the base dequantises; merges come after their sources."""
    sources: dict[str, set[str]] = {adapter.name: {adapter.name} for adapter in adapters}
    for merge in merges:
        terms = (sources.get(term.name, set()) for term in merge.mix.terms)
        sources[merge.name] = set[str]().union(*terms)
        if merge.into_base and merge.dequantize:
            for adapter in adapters:
                for site in adapter.sites if adapter.name in sources[merge.name] else ():
                    yield merge, site
