"""Adapters over weights in 4 or 8 bits: what they cannot do there."""

from collections.abc import Iterator, Mapping, Sequence

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.alike import once_each
from lora_fx.plan.base_merges import packed_modules
from lora_fx.plan.modules import Modules
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan


def quantized_adapter_faults(
    adapters: Sequence[AdapterPlan], quantized: Mapping[str, QuantizedModule], modules: Modules
) -> list[Diagnostic]:
    """Refuse to train packed weights, to adapt them as parameters, and LoftQ that fits them not.

    What LoftQ leaves of a weight are the values of 4 bits, which `nf4` packs without loss.
    """
    packed = {*quantized, *packed_modules(modules)}
    faults = [fault for adapter in adapters for fault in _trained(adapter, packed)]
    for site in (site for adapter in adapters for site in adapter.sites):
        if site.parameter is not None and site.fqn in quantized:
            faults.append(_as_parameter(site))
        if site.init.name == "loftq" and site.fqn in quantized:
            faults += _loftq(site, quantized[site.fqn])
    return once_each(faults)


def _trained(adapter: AdapterPlan, packed: set[str]) -> Iterator[Diagnostic]:
    for trained in adapter.modules:
        within = (n for n in sorted(packed) if f"{n}.".startswith(f"{trained.fqn}."))
        for name in within:
            yield Diagnostic(
                "cannot-apply",
                "a weight in 4 or 8 bits cannot be trained itself",
                trained.rule,
                f"that of `{name}`",
                help="adapt it, or leave it out of `quantize`",
            )


def _as_parameter(site: SitePlan) -> Diagnostic:
    message = "a weight that is quantised cannot be adapted as a parameter"
    label, help = f"`{site.name}`", "name the module that it is of"
    return Diagnostic("cannot-apply", message, site.rule, label, help=help)


def _loftq(site: SitePlan, how: QuantizedModule) -> Iterator[Diagnostic]:
    bits = dict(site.init.arguments).get("bits")
    if bits == 4 and how.method.name == "nf4" and not how.method.argument("double_quant"):
        return
    yield Diagnostic(
        "cannot-apply",
        "init `loftq` leaves a weight that only `nf4` packs without loss",
        site.settings["init"].span if "init" in site.settings else site.rule,
        f"`{site.fqn}` is quantised otherwise",
        ((how.rule, "here"),),
        help="write `loftq(bits = 4)` and `method = nf4`, without `double_quant`; or `pissa`",
    )
