"""Repeat and drop ranges of layers on the module tree.

Kim et al. 2023 (SOLAR), arXiv 2312.15166, §2: depth up-scaling.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.layer_configs import configs, follow
from lora_fx.plan.offloaded import weight_stores
from lora_fx.plan.selector_faults import layer_range
from lora_fx.plan.stacks import Stack, find_stacks
from lora_fx.spec.expressions import quote
from lora_fx.spec.selectors import Range
from lora_fx.spec.spec import LayersSpec


@dataclass(frozen=True)
class LayerMap:
    """Which old layer each new one is: `old[new index]`; `ranges` are half-open, in old layers."""

    stack: str
    ranges: tuple[tuple[int, int], ...]
    old: tuple[int, ...]


def replicate_layers(tree: nn.Module, spec: LayersSpec) -> LayerMap:
    """Build the new stack in place and return where each layer came from.

    The first use of a layer is the layer itself; a further use is a copy of its modules on the
    same Parameters (with `share`; else on copies), with buffers of its own. Layer indices inside
    the layers, and every count or per-layer list in the configs, follow. Raises LoraFxError for
    ranges outside the stack.
    """
    stack = _stack(tree, spec)
    count = len(stack.layers)
    dropped = {i for start, end in _bounds(spec.dropped, count) for i in range(start, end)}
    ranges = _bounds(spec.ranges, count) if spec.ranges else ((0, count),)
    old = tuple(i for start, end in ranges for i in range(start, end) if i not in dropped)
    if not old:
        message = "no layer is left"
        raise LoraFxError((Diagnostic("layer-range", message, spec.span),))
    used: set[int] = set()
    layers = []
    for new, index in enumerate(old):
        layer = stack.layers[index]
        layers.append(_copy(layer, spec.share) if index in used else layer)
        used.add(index)
        _renumber(layers[-1], new)
    parent, _, name = stack.fqn.rpartition(".")
    setattr(tree.get_submodule(parent), name, nn.ModuleList(layers))
    follow(tree, stack.fqn, count, old)
    return LayerMap(stack.fqn, ranges, old)


def _stack(tree: nn.Module, spec: LayersSpec) -> Stack:
    stacks = {stack.fqn: stack for stack in find_stacks(tree)}
    if spec.stack in stacks:
        return stacks[spec.stack]
    if spec.stack is None and len(stacks) == 1:
        return next(iter(stacks.values()))
    names = ", ".join(f"`{fqn}`" for fqn in stacks) or "none"
    if spec.stack is not None:
        message, help = f"`{spec.stack}` is no stack of layers", None
    else:
        message = f"the model has {len(stacks)} stacks of layers"
        help = f"name one: `of = {quote(next(iter(stacks)))}`" if stacks else None
    notes = (f"the stacks are {names}",)
    raise LoraFxError((Diagnostic("ambiguous-stack", message, spec.span, notes=notes, help=help),))


def _bounds(ranges: tuple[Range, ...], count: int) -> tuple[tuple[int, int], ...]:
    beyond = [layer_range(part, count) for part in ranges if part.last >= count]
    if beyond:
        raise LoraFxError(beyond)
    return tuple((part.start or 0, count if part.end is None else part.end) for part in ranges)


def _copy(layer: nn.Module, share: bool) -> nn.Module:
    kept = (*layer.parameters(), *_quantisation(layer)) if share else ()
    shared = (*kept, *configs(layer), *weight_stores(layer))
    memo: dict[int, Any] = {id(one): one for one in shared}
    return copy.deepcopy(layer, memo)


def _quantisation(layer: nn.Module) -> list[Any]:
    """Return bitsandbytes' scales of 4-bit weights: they belong to the weight, not to the layer."""
    states = [getattr(parameter, "quant_state", None) for parameter in layer.parameters()]
    return [state for state in states if state is not None]


def _renumber(layer: nn.Module, index: int) -> None:
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]
