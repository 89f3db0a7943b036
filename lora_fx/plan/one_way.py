"""A weight is adapted as that of its module or as a parameter, by all adapters alike."""

from collections.abc import Iterable

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.alike import once_each
from lora_fx.plan.sites import SitePlan


def two_way_faults(sites: Iterable[SitePlan]) -> list[Diagnostic]:
    """Refuse a module that one adapter adapts, and of which another adapts a parameter."""
    first: dict[str, SitePlan] = {}
    faults = []
    for site in sites:
        other = first.setdefault(site.fqn, site)
        if other.is_parameter is not site.is_parameter:
            faults.append(
                Diagnostic(
                    "cannot-apply",
                    f"`{site.fqn}` is adapted as a module and as a parameter",
                    site.rule,
                    f"`{other.adapter}` adapts `{other.name}`",
                    ((other.rule, "adapted here"),),
                    help="let all adapters adapt it in one way",
                )
            )
    return once_each(faults)
