"""Repeat ranges of layers on the module tree; the copies share the base weights.

Kim et al. 2023 (SOLAR), arXiv 2312.15166, §2: depth up-scaling.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.selectors import layer_range
from lora_fx.plan.stacks import Stack, find_stacks
from lora_fx.spec.spec import Replication


@dataclass(frozen=True)
class LayerMap:
    """Which old layer each new one is: `old[new index]`; `ranges` are half-open, in old layers."""

    stack: str
    ranges: tuple[tuple[int, int], ...]
    old: tuple[int, ...]


def replicate_layers(tree: nn.Module, replication: Replication) -> LayerMap:
    """Build the new stack in place and return where each layer came from.

    The first use of a layer is the layer itself; a further use is a copy of its modules on the
    same Parameters, with buffers of its own. Layer indices inside the layers, and every count or
    per-layer list in the configs, follow. Raises LoraFxError for ranges outside the stack.
    """
    stack = _only_stack(tree, replication)
    count = len(stack.layers)
    ranges = _bounds(replication, count)
    old = tuple(i for start, end in ranges for i in range(start, end))
    used: set[int] = set()
    layers = []
    for new, index in enumerate(old):
        layer = stack.layers[index]
        layers.append(_share(layer) if index in used else layer)
        used.add(index)
        _renumber(layers[-1], new)
    parent, _, name = stack.fqn.rpartition(".")
    setattr(tree.get_submodule(parent), name, nn.ModuleList(layers))
    for config in _configs(tree):
        _follow(config, count, old)
    return LayerMap(stack.fqn, ranges, old)


def _only_stack(tree: nn.Module, replication: Replication) -> Stack:
    stacks = find_stacks(tree)
    if len(stacks) != 1:
        names = ", ".join(f"`{stack.fqn}`" for stack in stacks) or "none"
        message = f"layers are replicated in a model of one stack; this one has {len(stacks)}"
        raise LoraFxError(
            (Diagnostic("ambiguous-stack", message, replication.span, notes=(f"stacks: {names}",)),)
        )
    return stacks[0]


def _bounds(replication: Replication, count: int) -> tuple[tuple[int, int], ...]:
    beyond = [layer_range(part, count) for part in replication.ranges if part.last >= count]
    if beyond:
        raise LoraFxError(beyond)
    return tuple(
        (part.start or 0, count if part.end is None else part.end) for part in replication.ranges
    )


def _share(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for shared in (*layer.parameters(), *_quantisation(layer), *_configs(layer)):
        memo[id(shared)] = shared
    return copy.deepcopy(layer, memo)


def _quantisation(layer: nn.Module) -> list[Any]:
    """Return bitsandbytes' scales of 4-bit weights: they belong to the weight, not to the layer."""
    states = [getattr(parameter, "quant_state", None) for parameter in layer.parameters()]
    return [state for state in states if state is not None]


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _configs(tree: nn.Module) -> Iterator[Any]:
    """Yield every distinct config object in the tree, nested ones too."""
    seen: set[int] = set()
    for module in tree.modules():
        config = getattr(module, "config", None)
        nested = [v for v in vars(config).values() if hasattr(v, "to_dict")] if config else []
        for one in (config, *nested):
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                yield one


def _follow(config: Any, count: int, old: tuple[int, ...]) -> None:
    if getattr(config, "num_hidden_layers", None) != count:
        return
    lists = {
        name: [value[i] for i in old]
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count and _is_per_layer(name)
    }
    config.num_hidden_layers = len(old)
    for name, value in lists.items():
        setattr(config, name, value)


def _is_per_layer(name: str) -> bool:
    """Tell lists of layers from lists that may happen to be as long."""
    return name != "architectures" and not name.endswith(("token_id", "token_ids"))
