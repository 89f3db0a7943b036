"""Find a model's stacks: the `ModuleList`s of repeated blocks, where layers are counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a model, in order."""

    fqn: str
    layers: Sequence[nn.Module]


@dataclass(frozen=True)
class Place:
    """Where a module stands: in layer `index` of a stack."""

    stack: Stack
    index: int


def find_stacks(tree: nn.Module) -> list[Stack]:
    """Return the stacks in module order, outer before inner.

    A `ModuleList` is a stack if its members are transformers' checkpointed layers; in a model that
    has none of these, if it has two members or more, all of one class that has children. A list
    inside a layer of another is left out.
    """
    found: list[Stack] = []
    for stack in every_stack(tree):
        if not any(stack.fqn.startswith(f"{outer.fqn}.") for outer in found):
            found.append(stack)
    return found


def every_stack(tree: nn.Module) -> list[Stack]:
    """Return the outermost stacks and, of checkpointed layers, those inside layers too.

    Lists of one class inside a layer are experts or branches, not layers.
    """
    lists = [
        (fqn, module)
        for fqn, module in tree.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    marked = [(fqn, module) for fqn, module in lists if _is_checkpointed(module)]
    if marked:
        return [Stack(fqn, tuple(module)) for fqn, module in marked]
    found: list[Stack] = []
    for fqn, module in lists:
        inside = any(fqn.startswith(f"{stack.fqn}.") for stack in found)
        if _is_repeated(module) and not inside:
            found.append(Stack(fqn, tuple(module)))
    return found


def place_of(fqn: str, stacks: Sequence[Stack]) -> Place | None:
    """Return the layer of the innermost stack that a module stands in, None outside all."""
    for stack in reversed(stacks):
        if fqn.startswith(f"{stack.fqn}."):
            return Place(stack, int(fqn[len(stack.fqn) + 1 :].partition(".")[0]))
    return None


def _is_checkpointed(module: nn.ModuleList) -> bool:
    return all(isinstance(layer, GradientCheckpointingLayer) for layer in module)


def _is_repeated(module: nn.ModuleList) -> bool:
    classes = {type(layer) for layer in module}
    has_children = any(True for layer in module for _ in layer.children())
    return len(module) > 1 and len(classes) == 1 and has_children
