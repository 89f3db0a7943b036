"""Spec × module tree → plan, on meta tensors; knows shapes and names, never weights.

Users call `lora_fx.plan(spec, model)`, and Python puts this package under the same name as soon
as anything in it is imported; so the package can be called, and does what its `plan` does.
"""

import sys
from types import ModuleType

from lora_fx.plan.plan import Plan, plan_sites
from lora_fx.plan.replication import replicate_layers
from lora_fx.plan.skeleton import ModelLike, structure_of, tree_of
from lora_fx.spec import parse
from lora_fx.spec.spec import Spec, SpecLike

__all__ = ["Plan", "plan"]


def plan(spec: SpecLike, model: ModelLike | None = None) -> Plan:
    """Say what a spec would do to a model, without weights and without changing it.

    `model` is a live model, a config, a folder, a `config.json` or a hub id; None is the model
    that the spec names. Raises LoraFxError with everything that is wrong.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    tree = tree_of(model, spec)
    if spec.layers is None:
        return plan_sites(spec, tree)
    tree = structure_of(tree)
    return plan_sites(spec, tree, replicate_layers(tree, spec.layers))


class _Callable(ModuleType):
    def __call__(self, spec: SpecLike, model: ModelLike | None = None) -> Plan:
        return plan(spec, model)


sys.modules[__name__].__class__ = _Callable
