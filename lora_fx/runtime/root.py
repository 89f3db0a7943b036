"""Turn an adapted module tree into the compiled model that users hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.routing import Routing, carry, checkpoint_routed
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.runtime.facade import HuggingFace
from lora_fx.runtime.methods.slots import SlotMethods
from lora_fx.runtime.routing.call import INDICES, argument_of, run_routed
from lora_fx.runtime.routing.generating import Generating
from lora_fx.runtime.routing.invocation import STARTS
from lora_fx.runtime.routing.routes import DEFAULT
from lora_fx.runtime.units.unit import Compiled


class Plain(SlotMethods):
    """Mixin for a compiled model that is not a `PreTrainedModel`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; `adapter_names` gives each sample its own adapter."""
        return run_routed(self, super().forward, args, kwargs)[0]


def make_root(tree: nn.Module, plan: Plan, adapters: Mapping[str, AdapterPlan]) -> None:
    """Give the tree methods for the adapters in it and activate the first one, in place."""
    facade = Plain
    if isinstance(tree, PreTrainedModel):
        facade = Generating if tree.can_generate() else HuggingFace
    specialise(tree, facade, keywords=(argument_of(plan.spec.route), INDICES, STARTS))
    tree.lora_fx_plan = plan  # type: ignore[assignment]
    tree.lora_fx_routing = Routing()  # type: ignore[assignment]
    tree.lora_fx_adapters = dict(adapters)  # type: ignore[assignment]
    tree.lora_fx_slots = None  # type: ignore[assignment]
    tree.lora_fx_rows_known = ()  # type: ignore[assignment]
    tree.lora_fx_present = None  # type: ignore[assignment]
    tree.lora_fx_merged = ()  # type: ignore[assignment]
    tree.lora_fx_enabled = True  # type: ignore[assignment]
    tree.lora_fx_watched = set()  # type: ignore[assignment]
    tree.lora_fx_checkpoint = "none"  # type: ignore[assignment]
    for module in tree.modules():
        carry(module, tree.lora_fx_routing)  # type: ignore[arg-type]
        if isinstance(module, Compiled):
            module.lora_routing = tree.lora_fx_routing  # type: ignore[assignment]
    take_default(tree)


def take_default(tree: Any) -> None:
    """Let a call without names get what the spec's `default` says; without it, the first adapter.

    Where the spec routes tokens, all adapters but general knowledge, which are checked.
    Also where an adapter that it names is not there.
    """
    route, first = tree.lora_fx_plan.spec.route, tree._first(tree.lora_fx_adapters)
    tree._require_tokens_routable(first)
    terms = None if route is None or route.default is None else route.default.terms
    if terms is not None and any(term.name not in tree.lora_fx_adapters for term in terms):
        terms = None
    is_mix = terms is not None and (len(terms) > 1 or any(term.weight != 1 for term in terms))
    tree.lora_fx_default = DEFAULT if is_mix else None
    tree.lora_fx_active = first if terms is None or is_mix else tuple(t.name for t in terms)
    tree.lora_fx_enabled = True
    tree._activate()


def checkpoint_layers(tree: nn.Module, layers: list[nn.Module]) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again there."""
    if isinstance(tree, PreTrainedModel):
        if hasattr(tree, "activation_checkpointing_enable"):
            tree.activation_checkpointing_enable({"use_reentrant": False})
        else:
            tree.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        for layer in layers:
            specialise(layer, Checkpointed)
            layer.lora_fx_carried = tree.lora_fx_routing


class Checkpointed:
    """Mixin for a layer of a plain model: non-reentrant activation checkpointing."""

    def forward(self, *args, **kwargs):
        """Run the layer, saving only its inputs while training."""
        forward = super().forward  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            routing = self.lora_fx_carried  # type: ignore[attr-defined]
            return checkpoint_routed(
                routing, checkpoint, forward, *args, use_reentrant=False, **kwargs
            )
        return forward(*args, **kwargs)
