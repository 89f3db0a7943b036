"""Find out once which adapters each sample has, for all the sites that ask the same.

    before   %p0 = lora_fx.choose(%samples, [0, 1], 1)      at one site
             %p1 = lora_fx.choose(%samples, [0, 1], 1)      at another
    after    %p = lora_fx.choose(%samples, [0, 1], 1)       at both

And so for what else is computed of the samples' shares alone. They are an input of the graph, which
nothing writes to and which has no gradient.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.graph import ops
from lora_fx.rewrite.driver import graph_modules

_OF_SHARES: tuple[Any, ...] = (
    ops.choose,
    torch.gather,
    torch.narrow,
    torch.select,
    torch.stack,
    torch.clamp,
    "to",
)


def share_choices(module: GraphModule) -> int:
    """Let the first of equal nodes stand for all; return how many others there were."""
    shared = 0
    for part in graph_modules(module):
        known = _inputs(part.graph)
        first: dict[Hashable, Node] = {}
        for node in list(part.graph.nodes):
            if node.target not in _OF_SHARES or not known.issuperset(node.all_input_nodes):
                continue
            earlier = first.setdefault(_meaning(node), node)
            known.add(earlier)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                part.graph.erase_node(node)
                shared += 1
        part.graph.lint()
        part.recompile()
    return shared


def _inputs(graph: Graph) -> set[Node]:
    """Return the inputs of a graph that are shares of samples."""
    found = set()
    for choice in graph.find_nodes(op="call_function", target=ops.choose):
        samples = choice.args[0]
        while samples.target == "to":  # type: ignore[union-attr]
            samples = samples.args[0]  # type: ignore[union-attr]
        if samples.op == "placeholder":  # type: ignore[union-attr]
            found.add(samples)
    return found  # type: ignore[return-value]


def _meaning(node: Node) -> Hashable:
    return node.target, _hashable(node.args), _hashable(sorted(node.kwargs.items()))


def _hashable(value: Any) -> Hashable:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
