"""Name a captured graph's inputs after the model's tensors.

Dynamo passes weights as graph inputs. They are told apart from data by identity: the example
inputs a backend receives are the model's own parameters and buffers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from lora_fx.graph.text import FQN


def tensor_names(module: nn.Module) -> dict[int, str]:
    """Return the fqn of each parameter and buffer by `id`; of tied ones, the first."""
    names: dict[int, str] = {}
    for fqn, tensor in [*module.named_parameters(), *module.named_buffers()]:
        names.setdefault(id(tensor), fqn)
    return names


def mark_sizes(arguments: Any, inputs: Any) -> None:
    """Ask Dynamo to make symbols of those sizes of `arguments` that are sizes of `inputs`."""
    sizes = {n for tensor in _tensors(inputs) for n in tensor.shape if n > 1}
    for tensor in _tensors(arguments):
        for dimension, size in enumerate(tensor.shape):
            if size in sizes:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def name_inputs(module: GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> None:
    """Note the fqn of every weight among the inputs, in bodies of higher-order operators too."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for placeholder, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, Tensor) and id(value) in names:
            placeholder.meta[FQN] = names[id(value)]
    _name_bodies(module)


def _name_bodies(module: GraphModule) -> None:
    for node in module.graph.nodes:
        body, arguments = body_of(module, node)
        if body is None:
            continue
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(inner, arguments, strict=False):
            if isinstance(argument, Node) and FQN in argument.meta:
                placeholder.meta[FQN] = argument.meta[FQN]
        _name_bodies(body)


def body_of(module: GraphModule, node: Node) -> tuple[GraphModule | None, Sequence[Any]]:
    """Return the graph a higher-order call takes first, and what it is given; else None."""
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or first.op != "get_attr":
        return None, ()
    body = getattr(module, str(first.target), None)
    return (body, node.args[1:]) if isinstance(body, GraphModule) else (None, ())


def named_input(node: Node) -> Node:
    """Return the named input that a node is, or is a view of; any other node as far as it leads."""
    while FQN not in node.meta and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
