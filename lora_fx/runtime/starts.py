"""How the adapters of a plan start where no folder gives their values."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.init import OF_DATA, initialise, is_without_values
from lora_fx.adapters.init.batches import Batches
from lora_fx.adapters.init.eva import directions
from lora_fx.adapters.init.observe import observe
from lora_fx.adapters.peft.keys import ranks_of
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan, with_adapters
from lora_fx.plan.ranks import with_ranks
from lora_fx.plan.sites import LOOKS_AT_BASE, SitePlan
from lora_fx.runtime.progress import Report

Start = Callable[[SitePlan, nn.Module], Mapping[str, Tensor]]
_HELP = "pass `calibration=` batches to `lora_fx.compile`, or `lora-fx compile --calibration FILE`"


def starts(
    tree: nn.Module,
    plan: Plan,
    given: Mapping[str, Mapping[str, Tensor]],
    calibration: Batches | None,
    report: Report,
) -> tuple[Plan, Start]:
    """Return the plan with the ranks that `eva` gives, and what initialises a site.

    The data is looked at here, before anything is bound. `given` are the tensors of the adapters
    that have values already. `report` hears of what takes long. Raises LoraFxError if an init needs
    data and there is none, or if no init needs the data that is there. On meta no data is needed.
    """
    sites = [site for site in plan.sites if site.adapter not in given]
    of_data = [site for site in sites if site.init.name in OF_DATA]
    if any(is_without_values(tree.get_submodule(site.fqn), site.weight) for site in of_data):
        return plan, initialise
    observed = _observed(tree, of_data, calibration, report)
    slow = [(s.adapter, s.name) for s in sites if s.init.name in LOOKS_AT_BASE]

    def start(site: SitePlan, module: nn.Module) -> Mapping[str, Tensor]:
        key = site.adapter, site.name
        if key in slow:
            report(f"init `{site.init.name}` of `{site.name}`", slow.index(key), len(slow))
        return initialise(site, module, observed.get(key))

    ranks = {name: ranks_of(state) for name, state in given.items()}
    for (adapter, fqn), tensor in observed.items():
        ranks.setdefault(adapter, {})[fqn] = len(tensor)
    return _ranked(tree, plan, ranks), start


def _ranked(tree: nn.Module, plan: Plan, ranks: Mapping[str, Mapping[str, int]]) -> Plan:
    adapters = []
    for adapter in plan.adapters:
        known = ranks.get(adapter.name, {})
        of_eva = [site.fqn for site in adapter.sites if site.init.name == "eva"]
        adapters.append(with_ranks(adapter, {fqn: known.get(fqn, 0) for fqn in of_eva}))
    return with_adapters(plan, tuple(adapters), tree) if adapters != list(plan.adapters) else plan


def _observed(
    tree: nn.Module, sites: list[SitePlan], calibration: Batches | None, report: Report
) -> dict[tuple[str, str], Tensor]:
    if calibration is None:
        if sites:
            site = sites[0]
            message = f"init `{site.init.name}` looks at data, and there is none"
            span = site.settings["init"].span
            raise LoraFxError((Diagnostic("calibration-data", message, span, help=_HELP),))
        return {}
    if not sites:
        message, help = "no init of the spec looks at data", "leave out `calibration`"
        raise LoraFxError((Diagnostic("calibration-data", message, help=help),))
    of_eva = [site for site in sites if site.init.name == "eva"]
    others = [site for site in sites if site.init.name != "eva"]
    told = _Told(calibration, report)
    found = dict(observe(tree, others, told)) if others else {}
    return found | (directions(tree, of_eva, told) if of_eva else {})


class _Told:
    """Batches of which it is told which one is being looked at."""

    def __init__(self, batches: Batches, report: Report) -> None:
        self._batches = batches
        self._report = report

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        of = len(self._batches) if hasattr(self._batches, "__len__") else 0  # type: ignore[arg-type]
        for done, batch in enumerate(self._batches):
            self._report("looking at the data", done, of)
            yield batch
