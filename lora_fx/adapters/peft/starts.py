"""How an adapter in a folder had changed the base when it started.

A folder that is written here says so itself, see `plain`. In one that PEFT has written lie only A
and B, over a weight that is changed again, by the same decomposition, whenever it is read. What
depends on random numbers or on data cannot be had again.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters.init import initialise
from lora_fx.adapters.peft.keys import prefixes_of
from lora_fx.adapters.peft.plain import Origin, doubled
from lora_fx.adapters.weights.changed_weight import fingerprint_of_base
from lora_fx.plan.changed_weights import changed_weight_faults
from lora_fx.plan.modules import modules_of
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import CHANGES_BASE, TAKES_FROM_BASE, SitePlan

Fault = tuple[str, str]  # code, message


def header_faults(plan: AdapterPlan, origins: Mapping[str, Origin]) -> list[Fault]:
    """Return a fault for each site in the header of a file that its config does not have so."""
    changeable = ("linear", "transposed", "conv", "attention")
    sites = {site.name: site for site in plan.sites if site.layer.kind in changeable}
    found = []
    for fqn, origin in origins.items():
        halves = origin.init in TAKES_FROM_BASE
        if fqn not in sites or origin.init not in CHANGES_BASE or (halves and sites[fqn].rank % 2):
            message = f"its header says of `{fqn}` that `{origin.init}` changed it: that cannot be"
            found.append(("adapter-unreadable", message))
    return found


def start_faults(plan: AdapterPlan) -> list[Fault]:
    """Return a fault if what an init of a config took out of the base is not known any more."""
    lost = [site for site in plan.sites if _is_lost(site)]
    if not lost:
        return []
    what = "numbers drawn" if lost[0].init.name == "pissa" else "data"
    message = (
        f"init `{lost[0].init.name}` changed the weight of `{lost[0].name}`"
        f"{_others(len(lost) - 1)} by {what} that the folder does not hold; "
        "let PEFT save it with `path_initial_model_for_weight_conversion`"
    )
    return [("adapter-lost-start", message)]


def _is_lost(site: SitePlan) -> bool:
    drawn = site.init.name == "pissa" and bool(site.init.arguments)
    return drawn or site.init.name in ("corda", "lora_ga")


def base_faults(
    plan: AdapterPlan, origins: Mapping[str, Origin], model: nn.Module
) -> Iterator[Fault]:
    """Yield what keeps an adapter from changing the weights of this model as it says."""
    for fault in changed_weight_faults([plan], modules_of(model)):
        yield fault.code, f"{fault.message} ({fault.label}); {fault.help}"
    sites = {site.name: site for site in plan.sites}
    places = {name: (model.get_submodule(sites[name].fqn), sites[name].weight) for name in origins}
    found = [(n, one.base, fingerprint_of_base(*places[n])) for n, one in origins.items()]
    other = [one for one in found if one[1] != one[2]]
    if other:
        fqn, there, here = other[0]
        message = f"the weight of `{fqn}` is {_described(here, there)}{_others(len(other) - 1)}"
        yield "adapter-other-base", message


def _described(here: str, there: str) -> str:
    dtype, shape, *_ = here.split(" ")
    dtype_there, shape_there, *_ = (*there.split(" "), "")
    if dtype != dtype_there:
        return f"{dtype} here, and was {dtype_there} when the adapter changed it"
    if shape != shape_there:
        return f"{shape} here, and was {shape_there} when the adapter changed it"
    return "another than the one that the adapter changed"


def _others(count: int) -> str:
    return f", and likewise {count} more" if count else ""


def with_starts(
    plan: AdapterPlan, state: Mapping[str, Tensor], model: nn.Module
) -> Mapping[str, Tensor]:
    """Return a file's tensors as `plain` has them: with what PEFT would compute again."""
    whole, prefixes = dict(state), prefixes_of(plan)
    for site in plan.sites:
        if site.takes_from_base:
            start = initialise(site, model.get_submodule(site.fqn))
            dtype = getattr(torch, site.dtype)
            rounded = {name: tensor.to(dtype) for name, tensor in start.items()}
            whole |= doubled(state, prefixes[site.name], rounded)
    return whole
