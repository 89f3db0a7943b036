"""Nodes of aten graphs: their values, and new ones."""

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from lora_fx.rewrite.metadata import fake_mode

_VALUE = "val"


def value(node: Any) -> torch.Tensor:
    """Return the fake tensor that stands for a node's result."""
    return node.meta[_VALUE]


def call(graph: Graph, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call with its fake result, and the place in the model's source of `like`."""
    node = graph.call_function(target, args, kwargs)
    values = map_arg(args, value)
    with fake_mode([values, value(like)]):
        node.meta = {**like.meta, _VALUE: target(*values, **kwargs)}
    return node


def same_size(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two shapes are known to be equal; symbols are not guarded on."""
    pairs = zip(one.shape, other.shape, strict=False)
    return one.dim() == other.dim() and all(statically_known_true(a == b) for a, b in pairs)
