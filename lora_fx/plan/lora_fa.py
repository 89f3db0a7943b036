"""What `optimizer { name = lora_fa }` asks of adapters: A stays as it is."""

from collections.abc import Iterable
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.alike import once_each
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import OptimizerSpec

_KINDS = ("linear", "transposed", "embedding")


def with_frozen_A(plan: AdapterPlan, optimizer: OptimizerSpec | None) -> AdapterPlan:
    """Return the plan in which no A is trained, if that is the optimizer's way.

    Zhang et al. 2023, LoRA-FA, arXiv 2308.03303, §3.
    """
    if optimizer is None or optimizer.name != "lora_fa":
        return plan
    return replace(plan, sites=tuple(map(_frozen, plan.sites)))


def lora_fa_faults(
    adapters: Iterable[AdapterPlan], optimizer: OptimizerSpec | None
) -> list[Diagnostic]:
    """Refuse what is trained in a way for which LoRA-FA's gradient of B is not the right one."""
    if optimizer is None or optimizer.name != "lora_fa":
        return []
    trained = [site for adapter in adapters for site in adapter.sites if site.trainable]
    reasons = ((_reason(site), site) for site in trained)
    faults = [
        Diagnostic(
            "cannot-apply",
            f"optimizer `lora_fa` and {reason} do not go together",
            optimizer.span,
            f"at `{site.name}`",
        )
        for reason, site in reasons
        if reason
    ]
    return once_each(faults)


def _reason(site: SitePlan) -> str | None:
    if site.variant.name != "lora":
        return f"variant `{site.variant.name}`"
    if site.init.name == "mica":
        return "init `mica`, whose B is not trained"
    if site.layer.kind not in _KINDS:
        return f"adapters of `{site.name}`"
    return None


def _frozen(site: SitePlan) -> SitePlan:
    return replace(site, frozen=site.frozen | {name for name in site.tensors if "_A" in name})
