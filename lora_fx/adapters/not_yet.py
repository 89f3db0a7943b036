"""What can be planned and not yet be done: refused when a model is compiled, by name and line."""

from collections.abc import Iterator

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan


def require_supported(plan: Plan) -> None:
    """Raise LoraFxError with everything in a plan that this version cannot do."""
    found = [one for site in plan.sites for one in _of_site(site)]
    found += [one for adapter in plan.adapters for one in _of_adapter(adapter)]
    faults = once_each(
        [
            Diagnostic("not-supported-yet", f"{what} cannot be compiled yet", span, label)
            for what, span, label in found
        ]
    )
    if faults:
        raise LoraFxError(sorted(faults, key=lambda d: d.span.start if d.span else 0))


def unsupported_parts(adapter: AdapterPlan) -> list[str]:
    """Name each thing of one adapter that this version cannot do, once."""
    found = [
        f"{what} is not supported yet" for site in adapter.sites for what, *_ in _of_site(site)
    ]
    return list(dict.fromkeys(found))


def _of_adapter(adapter: AdapterPlan) -> Iterator[tuple[str, Span | None, str]]:
    """Yield what no folder could hold: PEFT has one variant for all modules of an adapter."""
    variants = {site.variant: site for site in adapter.sites}
    names = {variant.name for variant in variants}
    if len(variants) > 1 and not names <= {"lora", "dora"}:
        first, other = list(variants.values())[:2]
        of_first = "variant" in first.settings and first.variant.name != "lora"
        site = first if of_first else other
        what = f"variant `{site.variant.name}` at some modules of an adapter"
        yield what, _set(site, "variant"), f"at `{site.name}`"
    tied = next((s for s in adapter.sites if s.tie and s.layer.kind == "embedding"), None)
    dora = next((s for s in adapter.sites if s.variant.name == "dora"), None)
    if tied is not None and dora is not None:
        what = f"variant `dora` in an adapter with the tied embedding `{tied.name}`"
        yield what, _set(dora, "variant"), f"at `{dora.name}`"


def _of_site(site: SitePlan) -> Iterator[tuple[str, Span | None, str]]:
    if site.variant.name == "velora" and site.changes_base:
        what = f"variant `velora` with init `{site.init.name}`"
        yield what, _set(site, "variant"), f"at `{site.name}`"


def _set(site: SitePlan, attribute: str) -> Span:
    return site.settings[attribute].span
