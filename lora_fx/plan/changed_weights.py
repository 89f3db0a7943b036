"""Inits that look at the base's weight or change it: what must hold of the weight."""

from collections.abc import Iterator, Sequence

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.base_merges import modules_sharing, packed_modules
from lora_fx.plan.modules import Modules
from lora_fx.plan.offloaded import offload_hook
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import LOOKS_AT_BASE, SitePlan


def changed_weight_faults(adapters: Sequence[AdapterPlan], modules: Modules) -> list[Diagnostic]:
    """Refuse to change a weight that is packed, shared, offloaded or changed twice.

    At most one adapter changes a weight, and then no other one trains it. What the spec quantises
    itself is whole when an init looks at it.
    """
    sharing = modules_sharing(modules)
    packed = set(packed_modules(modules))
    changing: dict[str, SitePlan] = {}
    faults = []
    for site in (site for adapter in adapters for site in adapter.sites):
        if site.changes_base and site.fqn in packed:
            message = f"{_what(site)} cannot be computed of a quantised weight"
            help = "load the base without quantisation, and write `quantize` in the spec: what is "
            help += f"left of the weight is packed then; or write another {_attribute(site)}"
            faults.append(_fault(site, message, f"`{site.name}` is packed", help))
        elif site.changes_base:
            faults += _of_change(site, sharing, changing, modules)
    faults += [fault for adapter in adapters for fault in _trained_elsewhere(adapter, changing)]
    return once_each(faults)


def _of_change(
    site: SitePlan,
    sharing: dict[str, list[str]],
    changing: dict[str, SitePlan],
    modules: Modules,
) -> Iterator[Diagnostic]:
    what = f"{_what(site)} changes the base's weight"
    first = changing.setdefault(site.name, site)
    if first is not site:
        label = f"`{first.adapter}` changes that of `{site.name}` too"
        help = f"let one of the adapters have another {_attribute(site)}"
        message = f"{what}, and only one adapter can"
        there = ((_span(first), "changed here"),)
        yield _fault(site, message, label, help, there)
    others = sharing.get(site.name, [])
    if others:
        replicated = all(modules.place(name) is not None for name in (site.name, others[0]))
        help = f"write another {_attribute(site)}"
        if replicated:
            help = "write `share = nothing` in `layers`, so that copies have weights of their own"
        label = f"that of `{site.name}` is also `{others[0]}`'s"
        yield _fault(site, f"{what}, and several modules share it", label, help)
    if offload_hook(modules.by_fqn[site.fqn]) is not None:
        label = f"that of `{site.name}` comes in when it runs"
        yield _fault(
            site, f"{what}, and it is offloaded", label, "load the model without offloading"
        )


def _trained_elsewhere(adapter: AdapterPlan, changing: dict[str, SitePlan]) -> Iterator[Diagnostic]:
    for trained in adapter.modules:
        for fqn, site in changing.items():
            if not f"{fqn}.".startswith(f"{trained.fqn}."):
                continue
            message = f"adapter `{adapter.name}` trains a weight that `{site.adapter}` changes"
            help = "train it in an adapter of a spec of its own"
            if site.adapter == adapter.name:
                message = (
                    f"adapter `{adapter.name}` has a whole weight that its {_what(site)} changes"
                )
                help = "adapt it or train it, not both; PEFT leaves it out of a folder with "
                help += "`save_pretrained(…, save_embedding_layers=False)`"
            there = ((_span(site), "changed here"),)
            yield Diagnostic(
                "cannot-apply", message, trained.rule, f"that of `{fqn}`", there, help=help
            )


def _fault(
    site: SitePlan,
    message: str,
    label: str,
    help: str,
    secondary: tuple[tuple[Span, str], ...] = (),
) -> Diagnostic:
    return Diagnostic("cannot-apply", message, _span(site), label, secondary, help=help)


def _attribute(site: SitePlan) -> str:
    """Return what it is of a site that looks at the weight."""
    return "init" if site.init.name in LOOKS_AT_BASE else "variant"


def _what(site: SitePlan) -> str:
    return f"{_attribute(site)} `{getattr(site, _attribute(site)).name}`"


def _span(site: SitePlan) -> Span:
    name = _attribute(site)
    return site.settings[name].span if name in site.settings else site.rule
