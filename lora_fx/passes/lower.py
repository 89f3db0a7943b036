"""Turn LoRA nodes into torch operators; afterwards no `lora_fx::` node is left.

    shrink(x, A, p, compute)          →  linear(dropout(x, p).to(d), A.to(d))
    expand(y, h, B, scalings, i, c)   →  y + linear((h * scalings[i]).to(d), B.to(d)).to(y.dtype)

d is the activations' dtype, or the named compute dtype, which then holds under autocast too.
"""

import operator
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lora_fx.graph import ops
from lora_fx.graph.autocast import without_autocast
from lora_fx.graph.structure import ACTIVATION, compute_dtype
from lora_fx.rewrite.driver import apply
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rewrite.rule import Match, Miss


def lower(module: GraphModule) -> int:
    """Replace every LoRA node; return how many there were."""
    return sum(apply([Lower(ops.shrink, _shrink), Lower(ops.expand, _expand)], module).values())


class Lower:
    """One LoRA operator → the torch operators it stands for."""

    name = "lower"

    def __init__(self, target: object, build: Callable[[Graph, Node], Node]) -> None:
        self._target = target
        self._build = build

    def match(self, node: Node) -> Match | Miss:
        """Match the operator."""
        return Match(node) if node.target is self._target else Miss("another operator")

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build the torch operators."""
        return self._build(graph, match.node)


def _shrink(graph: Graph, node: Node) -> Node:
    x, A, dropout, compute = node.args
    if dropout:
        x = call(graph, F.dropout, x, dropout, True)
    return _linear(graph, x, A, compute)


def _expand(graph: Graph, node: Node) -> Node:
    y, h, B, scalings, branch, compute = node.args
    scaling = call(graph, operator.getitem, scalings, branch)
    with _arithmetic(graph, h, compute):
        scaled = call(graph, torch.mul, h, scaling)
    delta = _linear(graph, scaled, B, compute)
    return call(graph, torch.add, y, _cast(graph, delta, dtype(y)))


def _linear(graph: Graph, x: object, weight: object, compute: object) -> Node:
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    with _arithmetic(graph, x, compute):
        return call(graph, F.linear, _cast(graph, x, wanted), _cast(graph, weight, wanted))


def _cast(graph: Graph, node: object, wanted: torch.dtype) -> object:
    return node if dtype(node) == wanted else call(graph, "to", node, wanted)


def _arithmetic(graph: Graph, x: object, compute: object):
    if compute == ACTIVATION:
        return nullcontext()
    return without_autocast(graph, x.meta[EXAMPLE].device.type)  # type: ignore[attr-defined]
