"""Read an input once for all the branches that start from it.

    before   %h0 = lora_fx.shrink(%x, %A0, 0.0, c)          A0: (r0, in)
             %h1 = lora_fx.shrink(%x, %A1, 0.0, c)          A1: (r1, in)
    after    %a = torch.cat([%A0, %A1])                     (r0 + r1, in)
             %h = lora_fx.shrink(%x, %a, 0.0, c)
             %h0, %h1 = torch.split(%h, [r0, r1], -1)

x Aᵀ for stacked A is the stacked result, so outputs and gradients are those of the single
products. So it is with `convolve`, whose features are before the places of its window. Left alone:
branches with dropout, since each draws a mask of its own, branches that compute in different
dtypes, or at different places, factors that are views made later, of a parameter, and branches
between which something is written in place, or the grad mode or autocast changes.
"""

import operator
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.graph import ops
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, inherit
from lora_fx.rewrite.surroundings import surroundings

_MOVED = (ops.block_diagonal, ops.perturb, torch.cat)


def share_shrinks(module: GraphModule) -> int:
    """Join the shrinks of each input; return how many joined shrinks were made."""
    joined = 0
    for part in graph_modules(module):
        groups: dict[object, list[Node]] = defaultdict(list)
        around = surroundings(part.graph)
        for node in part.graph.nodes:
            if node.target in (ops.shrink, ops.convolve) and node.args[2] == 0.0:
                x, A, _, *how = node.args
                kernel = A.meta[EXAMPLE].shape[1:]
                groups[node.target, x, *how, kernel, dtype(A), around[node]].append(node)
        order = {node: place for place, node in enumerate(part.graph.nodes)}
        for group in groups.values():
            shrinks = [one for one in group if _is_made(one.args[1], before=group[0], order=order)]
            if len(shrinks) > 1:
                _join(part.graph, shrinks)
                joined += 1
        part.graph.lint()
        part.recompile()
    return joined


def _is_made(A: Any, before: Node, order: Mapping[Node, int]) -> bool:
    """Whether a factor is there at a node; what is made of a parameter is moved there."""
    moved = A.target in _MOVED
    return all(order[node] < order[before] for node in (A.all_input_nodes if moved else [A]))


def _join(graph: Graph, shrinks: list[Node]) -> None:
    x, first, *how = shrinks[0].args
    features = 1 - first.meta[EXAMPLE].dim()  # type: ignore[union-attr]
    factors = [node.args[1] for node in shrinks]
    for A in factors:
        if A.target in _MOVED:  # type: ignore[union-attr]
            shrinks[0].prepend(A)  # type: ignore[arg-type]
    ranks = [A.meta[EXAMPLE].shape[0] for A in factors]  # type: ignore[union-attr]
    with graph.inserting_before(shrinks[0]):
        stacked = call(graph, torch.cat, factors)
        h = call(graph, shrinks[0].target, x, stacked, *how)
        split = call(graph, torch.split, h, ranks, features)
        parts = [call(graph, operator.getitem, split, i) for i in range(len(ranks))]
    provenance = {**_common(shrinks), "rule": "share_shrinks"}
    for node in (stacked, h, split, *parts):
        inherit(node, shrinks[0])
        node.meta["lora_fx"] = provenance
    for shrink, part in zip(shrinks, parts, strict=True):
        shrink.replace_all_uses_with(part)
        graph.erase_node(shrink)


def _common(nodes: list[Node]) -> dict[str, str]:
    """Return the provenance that all these nodes have in common."""
    metas = [node.meta.get("lora_fx", {}) for node in nodes]
    return {k: v for k, v in metas[0].items() if all(m.get(k) == v for m in metas)}
