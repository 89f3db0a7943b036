"""Every adapter of a plan, in place: started, read from files, or made by merges."""

from collections.abc import Mapping

from torch import Tensor, nn

from lora_fx.adapters.bind import Start, bind
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.runtime.given_weights import bind_weights, read_weights
from lora_fx.runtime.merging.statements import Adapters, run_merges

Given = Mapping[str, Mapping[str, Tensor]]


def bind_adapters(tree: nn.Module, plan: Plan, given: Given, start: Start) -> Adapters:
    """Put every adapter in place, and those that merges make; return them by name.

    What is trained starts from the base that merges leave.
    """
    late = [a for a in plan.adapters if plan.spec.merges and a.name not in given]
    there: Adapters = {a.name: a for a in plan.adapters if a not in late}
    for adapter in there.values():
        _bind_one(tree, adapter, given, start)
    there = run_merges(tree, plan.spec, there)
    for adapter in late:
        _bind_one(tree, adapter, given, start)
    every = {**there, **{adapter.name: adapter for adapter in late}}
    of_file = [adapter.name for adapter in plan.adapters if adapter.name in every]
    return {name: every[name] for name in (*of_file, *every)}


def _bind_one(tree: nn.Module, adapter: AdapterPlan, given: Given, start: Start) -> None:
    if adapter.name in given:
        bind_weights(tree, adapter, given[adapter.name])
    else:
        bind(tree, adapter, start)


def weights_of(tree: nn.Module, plan: Plan) -> Given:
    """Read the folder of each adapter that says `weights`."""
    layers = plan.layer_map.old if plan.layer_map else None
    named = {adapter.name: adapter for adapter in plan.spec.adapters}
    return {
        adapter.name: read_weights(adapter, named[adapter.name], tree, layers)
        for adapter in plan.adapters
        if "weights" in named[adapter.name].settings
    }
