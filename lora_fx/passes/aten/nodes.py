"""Nodes of aten graphs: their values, and new ones."""

import math
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from lora_fx.rewrite.metadata import fake_mode

aten = torch.ops.aten
CAST = torch.ops.prims.convert_element_type.default
HALF = (torch.bfloat16, torch.float16)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_VALUE = "val"


def value(node: Any) -> torch.Tensor:
    """Return the fake tensor that stands for a node's result."""
    return node.meta[_VALUE]


def args(node: Node) -> tuple[Any, ...]:
    """Return a node's arguments: nodes, numbers, and lists of them."""
    return node.args


def call(graph: Graph, like: Node, target: Any, *inputs: Any, **options: Any) -> Node:
    """Add a call with its fake result, and the place in the model's source of `like`."""
    node = graph.call_function(target, inputs, options)
    values = map_arg(inputs, value)
    with fake_mode([values, value(like)]):
        node.meta = {**like.meta, _VALUE: target(*values, **options)}
    return node


def same_size(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two shapes are known to be equal; symbols are not guarded on."""
    pairs = zip(one.shape, other.shape, strict=False)
    return one.dim() == other.dim() and all(statically_known_true(a == b) for a, b in pairs)


def elements(tensor: torch.Tensor) -> int | None:
    """Return how many elements a tensor has, None if that depends on symbols."""
    sizes = tensor.shape
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
