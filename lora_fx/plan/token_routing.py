"""Among which adapters tokens can be routed: `route { by = arrow(…) }`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.merge_sources import base_sources
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.spec import ArrowSpec, Spec

_KINDS = {
    "embedding": "an embedding",
    "conv": "a convolution",
    "attention": "`nn.MultiheadAttention`",
    "parameter": "a parameter",
}
_ADVICE = "route among adapters that are LoRA of linear layers, and nothing more"


def routed(arrow: ArrowSpec, adapters: Mapping[str, AdapterPlan]) -> tuple[str, ...]:
    """Return the adapters among which tokens are routed: all but general knowledge."""
    return tuple(name for name in adapters if name not in arrow.general)


def planned_faults(spec: Spec, adapters: Sequence[AdapterPlan]) -> list[Diagnostic]:
    """Return why tokens cannot be routed among those of a spec's adapters that stay adapters."""
    if spec.route is None or spec.route.arrow is None:
        return []
    gone = base_sources(spec)
    there = {plan.name: plan for plan in adapters if plan.name not in gone}
    arrow = spec.route.arrow
    known = replace(arrow, general=tuple(name for name in arrow.general if name in there))
    return routing_faults(known, routed(known, there), there)


def routing_faults(
    arrow: ArrowSpec, chosen: Sequence[str], adapters: Mapping[str, AdapterPlan]
) -> list[Diagnostic]:
    """Return why tokens cannot be routed among these adapters, `chosen` by name.

    They and those of `general` are LoRA without anything more, at the same linear layers, and not
    trained: a prototype is of an adapter that has been. What is subtracted has one rank with what
    it is subtracted from.
    """
    faults = [
        Diagnostic(
            "not-routable",
            f"`{name}` is general knowledge; no token is routed to it",
            help=f"choose others; `{name}` is subtracted from each of them",
        )
        for name in chosen
        if name in arrow.general
    ]
    missing = [name for name in arrow.general if name not in adapters]
    for name in missing if chosen else ():
        message = f"there is no adapter `{name}`, which arrow routing subtracts"
        help = f'call `load_adapter(folder, "{name}")` first'
        faults.append(Diagnostic("unknown-adapter", message, arrow.span, help=help))
    if faults:
        return faults
    plans = [adapters[name] for name in dict.fromkeys((*chosen, *arrow.general)) if chosen]
    found = [fault for plan in plans for fault in _of_adapter(plan)]
    return once_each(found or [f for plan in plans[1:] for f in _unlike(arrow, plans[0], plan)])


def _of_adapter(plan: AdapterPlan) -> Iterator[Diagnostic]:
    for site in plan.sites:
        yield from _of_site(site)
    whole = [("trains `{}` as a whole", m.fqn, m.rule) for m in plan.modules]
    whole += [("trains rows of `{}`", t.fqn, t.rule) for t in plan.tokens]
    whole += [("trains the bias `{}`", b.name, b.rule) for b in plan.biases]
    for what, name, span in whole:
        message = f"`{plan.name}` {what.format(numberless(name))}, which no token can have alone"
        yield Diagnostic("not-routable", message, span, help=_ADVICE)


def _of_site(site: SitePlan) -> Iterator[Diagnostic]:
    where = f"`{site.adapter}` at `{numberless(site.name)}`"
    if site.layer.kind in _KINDS:
        message = f"{where} adapts {_KINDS[site.layer.kind]}, where no token is routed"
        yield Diagnostic("not-routable", message, site.rule, help=_ADVICE)
        return
    if site.variant.name != "lora":
        yield _fault(site, "variant", f"{where} is `{site.variant.name}`", _ADVICE)
    if site.changes_base and site.variant.name != "kasa":
        message = f"{where} has changed the base's weight, by init `{site.init.name}`"
        yield _fault(
            site,
            "init",
            message,
            "save it, and load that folder: it is LoRA over the base's own weight",
        )
    if site.lora_bias:
        yield _fault(site, "lora_bias", f"{where} has a bias on B", _ADVICE)
    if site.tie:
        yield _fault(site, "tie", f"{where} is tied", _ADVICE)
    if site.trainable:
        message = f"`{site.adapter}` learns, and tokens are routed among adapters that have learned"
        help = "write `trainable = false`, or a folder: `weights = …`"
        yield _fault(site, "trainable", message, help, alone=True)


def _unlike(arrow: ArrowSpec, first: AdapterPlan, other: AdapterPlan) -> Iterator[Diagnostic]:
    ours, theirs = ({s.name: s for s in plan.sites} for plan in (first, other))
    both = (f"`{first.name}`", f"`{other.name}`")
    for name in (name for name in ours | theirs if (name in ours) is not (name in theirs)):
        one, another = both if name in ours else both[::-1]
        site = ours.get(name) or theirs[name]
        message = f"{one} adapts `{numberless(name)}`, and {another} does not"
        help = "tokens are routed among adapters of the same modules"
        yield Diagnostic("not-routable", message, site.rule, help=help)
    for name in (name for name in ours if arrow.general and name in theirs):
        ranks = ours[name].rank, theirs[name].rank
        if ranks[0] != ranks[1]:
            message = f"{both[0]} and {both[1]} have ranks {ranks[0]} and {ranks[1]}"
            label = f"at `{name}`"
            help = "general knowledge is subtracted factor by factor: from adapters of its rank"
            yield Diagnostic("not-routable", message, _span(theirs[name], "rank"), label, help=help)


def _fault(
    site: SitePlan, attribute: str, message: str, help: str, alone: bool = False
) -> Diagnostic:
    message = message if alone else f"{message}, and no token is routed to that"
    return Diagnostic("not-routable", message, _span(site, attribute), help=help)


def _span(site: SitePlan, attribute: str) -> Span | None:
    setting = site.settings.get(attribute)
    return setting.span if setting else site.rule
