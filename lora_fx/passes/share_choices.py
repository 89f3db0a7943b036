"""Find out once which adapters each sample has, for all the sites that ask the same.

    before   %p0 = lora_fx.choose(%samples, [0, 1], 1)      at one site
             %p1 = lora_fx.choose(%samples, [0, 1], 1)      at another
    after    %p = lora_fx.choose(%samples, [0, 1], 1)       at both

And so for what else is computed of the samples' shares alone. Nothing writes to them, and they have
no gradient.
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
        known = _samples(part.graph)
        first: dict[Hashable, Node] = {}
        for node in list(part.graph.nodes):
            if not _is_of_shares(node) or not known.issuperset(node.all_input_nodes):
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


def _samples(graph: Graph) -> set[Node]:
    """Return the shares of samples in a graph, before they are moved to a device."""
    found = set()
    for choice in graph.find_nodes(op="call_function", target=ops.choose):
        samples: Any = choice.args[0]
        while _is_of_shares(samples):
            samples = samples.args[0]
        found.add(samples)
    return found


def _is_of_shares(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _OF_SHARES


def _meaning(node: Node) -> Hashable:
    """Return what is equal for nodes that compute the same."""
    return node.target, _hashable(node.args), _hashable(sorted(node.kwargs.items()))


def _hashable(value: Any) -> Hashable:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
