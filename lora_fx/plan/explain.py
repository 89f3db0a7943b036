"""Why one module of a model gets what it gets, or nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.selectors import Selection, outermost
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.attributes import ADAPTER as ATTRIBUTES
from lora_fx.spec.attributes import OF_THE_WHOLE_ADAPTER
from lora_fx.spec.closest import closest
from lora_fx.spec.expressions import Value, show
from lora_fx.spec.spec import Setting

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan
    from lora_fx.plan.rules import AdapterPlan


@dataclass(frozen=True)
class Attribute:
    """An attribute's value at a site; `setting` set it, None is the default.

    `lost` are the settings that would have held without it, the nearest first.
    """

    name: str
    value: str
    setting: Setting | None
    lost: tuple[Setting, ...]


@dataclass(frozen=True)
class Verdict:
    """What a statement makes of a module: it selects it, or `left_out` says which clause does not.

    Neither of both: its patterns do not match the module.
    """

    selection: Selection
    selects: bool
    left_out: Span | None


@dataclass(frozen=True)
class Part:
    """What one adapter does to a module: `sites` at it, and what it trains of the module itself.

    `trained` is the name of the module of which a copy is trained, this one or one around it.
    """

    adapter: str
    sites: tuple[tuple[SitePlan, tuple[Attribute, ...]], ...]
    verdicts: tuple[Verdict, ...]
    trained: str | None
    tokens: tuple[int, ...]
    biases: tuple[str, ...]

    @property
    def does_nothing(self) -> bool:
        """Whether the adapter leaves the module as it is."""
        return not (self.sites or self.trained or self.tokens or self.biases)


def explain(plan: "Plan", name: str) -> tuple[Part, ...]:
    """Return what each adapter does to a module, or a parameter, by its dotted name, and why.

    Raises LoraFxError, with the closest name, if the model has no such module.
    """
    known = (*plan.modules, *plan.parameters)
    if name not in known:
        word = closest(name, known)
        help = f"did you mean `{word}`?" if word else "`lora-fx plan` lists what is adapted"
        message = f"the model has no module and no parameter `{name}`"
        raise LoraFxError((Diagnostic("no-such-module", message, help=help),))
    return tuple(_part(adapter, name) for adapter in plan.adapters)


def _part(adapter: "AdapterPlan", name: str) -> Part:
    sites = [one for one in adapter.sites if name in (one.name, one.fqn, one.target)]
    copies = {module.fqn: module for module in adapter.modules}
    rows = (tokens.ids for tokens in adapter.tokens if tokens.fqn == name)
    return Part(
        adapter.name,
        tuple((site, tuple(_attributes(site))) for site in sites),
        tuple(_verdict(selection, name, sites) for selection in adapter.selections),
        outermost(name, copies),
        next(rows, ()),
        tuple(b.name for b in adapter.biases if name in (b.name, b.name.rpartition(".")[0])),
    )


def _attributes(site: SitePlan) -> Iterator[Attribute]:
    for name in ATTRIBUTES:
        if name in OF_THE_WHOLE_ADAPTER:
            continue
        setting = site.settings.get(name)
        yield Attribute(name, _text(getattr(site, name)), setting, tuple(_lost(setting)))


def _text(value: Value) -> str:
    """Return a value as it is written, numbers without the digits that say nothing."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else show(value)


def _lost(setting: Setting | None) -> Iterator[Setting]:
    while setting is not None and setting.over is not None:
        setting = setting.over
        yield setting


def _verdict(selection: Selection, name: str, sites: list[SitePlan]) -> Verdict:
    names = {name, *(site.name for site in sites)}
    left_out = next((selection.left_out[n] for n in names if n in selection.left_out), None)
    return Verdict(selection, not names.isdisjoint(selection.names), left_out)
