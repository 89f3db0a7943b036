"""How the adapters of a plan start where no folder gives their values."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from lora_fx.adapters.init import initialise
from lora_fx.adapters.init.observe import OF_DATA, Batches, Observed, observe
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan
from lora_fx.plan.sites import LOOKS_AT_BASE, SitePlan
from lora_fx.runtime.progress import Report

_HELP = "pass `calibration=` batches to `lora_fx.compile`, or `lora-fx compile --calibration FILE`"


def starts(
    tree: nn.Module,
    plan: Plan,
    given: Collection[str],
    calibration: Batches | None,
    report: Report,
) -> Callable[[SitePlan, nn.Module], Mapping[str, Tensor]]:
    """Return what initialises a site; the data is looked at here, before anything is bound.

    `given` are the adapters that have values already. `report` hears of what takes long. Raises
    LoraFxError if an init needs data and there is none, or if no init needs the data that is there.
    """
    sites = [site for site in plan.sites if site.adapter not in given]
    observed = _observed(tree, [s for s in sites if s.init.name in OF_DATA], calibration, report)
    slow = [(s.adapter, s.fqn) for s in sites if s.init.name in LOOKS_AT_BASE]

    def start(site: SitePlan, module: nn.Module) -> Mapping[str, Tensor]:
        key = site.adapter, site.fqn
        if key in slow:
            report(f"init `{site.init.name}` of `{site.name}`", slow.index(key), len(slow))
        return initialise(site, module, observed.get(key))

    return start


def _observed(
    tree: nn.Module, sites: list[SitePlan], calibration: Batches | None, report: Report
) -> Observed:
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
    return observe(tree, sites, _told(calibration, report))


def _told(batches: Batches, report: Report) -> Batches:
    of = len(batches) if hasattr(batches, "__len__") else 0  # type: ignore[arg-type]
    for done, batch in enumerate(batches):
        report("looking at the data", done, of)
        yield batch
