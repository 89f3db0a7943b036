"""Turn an adapted module tree into the compiled model that users hold."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.runtime.convert_methods import ConvertMethods
from lora_fx.runtime.facade import HuggingFace
from lora_fx.runtime.uncalled import run_watched


class Plain(ConvertMethods):
    """Mixin for a compiled model that is not a `PreTrainedModel`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return run_watched(self, super().forward, args, kwargs)


def make_root(tree: nn.Module, plan: Plan, adapters: Mapping[str, AdapterPlan]) -> None:
    """Give the tree methods for the adapters in it and activate the first one, in place."""
    specialise(tree, HuggingFace if isinstance(tree, PreTrainedModel) else Plain)
    tree.lora_fx_plan = plan  # type: ignore[assignment]
    tree.lora_fx_adapters = dict(adapters)  # type: ignore[assignment]
    tree.lora_fx_active = tuple(adapters)[:1]  # type: ignore[assignment]
    tree.lora_fx_merged = ()  # type: ignore[assignment]
    tree.lora_fx_enabled = True  # type: ignore[assignment]
    tree.lora_fx_watched = {()}  # type: ignore[assignment]
    tree.lora_fx_checkpoint = "none"  # type: ignore[assignment]
    tree.enable_adapters()  # type: ignore[operator]


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


class Checkpointed:
    """Mixin for a layer of a plain model: non-reentrant activation checkpointing."""

    def forward(self, *args, **kwargs):
        """Run the layer, saving only its inputs while training."""
        forward = super().forward  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)
