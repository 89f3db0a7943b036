"""What can be planned and not yet be done: refused when a model is compiled, by name and line."""

from collections.abc import Iterator

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import Spec

_INITS = ("default", "gaussian", "random")
_WHAT = {
    "conv": "adapters on convolutions",
    "attention": "adapters on `nn.MultiheadAttention`",
    "parameter": "adapters on parameters",
}


def require_supported(plan: Plan) -> None:
    """Raise LoraFxError with everything in a plan that this version cannot do."""
    found = [*_of_spec(plan.spec), *(one for site in plan.sites for one in _of_site(site))]
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


def _of_spec(spec: Spec) -> Iterator[tuple[str, Span | None, str]]:
    if spec.route is not None:
        yield "`route`", spec.route.span, ""
    if spec.optimizer is not None:
        yield "`optimizer`", spec.optimizer.span, ""
    for merge in spec.merges:
        if merge.dequantize:
            yield "`dequantize`", merge.span, ""
    for quantize in spec.quantize:
        yield "`quantize`", quantize.span, ""


def _of_site(site: SitePlan) -> Iterator[tuple[str, Span | None, str]]:
    where = f"at `{site.name}`"
    if site.layer.kind in _WHAT:
        yield _WHAT[site.layer.kind], site.rule, where
    if site.init.name not in _INITS:
        yield f"init `{site.init.name}`", _set(site, "init"), where
    if site.variant.name != "lora":
        yield f"variant `{site.variant.name}`", _set(site, "variant"), where
    if site.offload:
        yield "`offload`", _set(site, "offload"), where


def _set(site: SitePlan, attribute: str) -> Span:
    return site.settings[attribute].span
