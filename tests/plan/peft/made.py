"""What PEFT makes of a model, and what a plan says: the same facts, read from either."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import nn

import lora_fx
from lora_fx.plan import Plan

ADAPTER = "default"


@dataclass(frozen=True)
class Made:
    """Rank, alpha and scaling of each adapted module or parameter, what else is trained, how much.

    `tokens` are the rows of each embedding. What shares the tensors of the embedding's adapter, or
    of its copy, is not listed again.
    """

    sites: Mapping[str, tuple[int, float, float]]
    trained: frozenset[str]
    tokens: Mapping[str, tuple[int, ...]]
    trainable: int


def by_peft(model: nn.Module, settings: Mapping[str, Any]) -> Made:
    """Let PEFT adapt the model, which it changes, and look at what it made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**deepcopy(dict(settings))))
    config = adapted.peft_config[ADAPTER]
    tied = {*(getattr(config, "modules_to_tie", None) or ())}
    tied |= {*(getattr(config, "target_modules_to_tie", None) or ())}
    modules = adapted.get_base_model().named_modules()
    named = {name: module for name, module in modules if name not in tied}
    trained = {p.data_ptr() or id(p): p.numel() for p in adapted.parameters() if p.requires_grad}
    return Made(
        {
            _name(name, module): (
                module.r[ADAPTER],
                module.lora_alpha[ADAPTER],
                module.scaling[ADAPTER],
            )
            for name, module in named.items()
            if isinstance(module, LoraLayer) and ADAPTER in module.r
        },
        frozenset(n for n, module in named.items() if isinstance(module, ModulesToSaveWrapper)),
        {
            name: tuple(module.token_adapter.token_indices[ADAPTER])
            for name, module in named.items()
            if isinstance(module, TrainableTokensWrapper)
            and module.token_adapter.tied_adapter is None
        },
        sum(trained.values()),
    )


def _name(name: str, module: LoraLayer) -> str:
    """The name in the base model: several parameters of one module are wrapped one in another."""
    if not isinstance(module, ParamWrapper):
        return name
    return f"{name.replace('.base_layer', '')}.{module.parameter_name}"


def by_plan(plan: Plan) -> Made:
    """Read a plan of one adapter."""
    return Made(
        {site.name: (site.rank, site.alpha, site.scaling) for site in plan.sites},
        frozenset(module.fqn for module in plan.trained),
        {tokens.fqn: tokens.ids for tokens in plan.tokens},
        plan.trainable,
    )


def by_import(settings: Mapping[str, Any], model: nn.Module) -> Made:
    """What the spec that a config becomes plans on the model."""
    return by_plan(lora_fx.plan(lora_fx.from_peft(dict(settings), model), model))
