"""Draw an input's dropout where its products are computed, on a GPU, from a seed for each branch.

    before   %h0 = lora_fx.shrink(%x, %A0, p, c)          A0: (r, in)
             %h1 = lora_fx.shrink(%x, %A1, p, c)          A1: (r, in)
    after    %seeds = randint(…, (2,))
             %rows = reshape(%x, (-1, in))
             %h = lora_fx.dropped_shrink(%rows, cat([%A0, %A1]), %seeds, p)      (rows, 2 r)
             %h0, %h1 = split(reshape(%h, (*, 2 r)), r, -1)

So no dropped copy of x is written or kept for the backward pass, which draws from the same seeds
again: `kernels/dropped_products.py`. It keeps x itself, as it does without dropout. Together are
branches of one p, rank and dtype, as many as a call takes; apart are those whose factors are made
later, and such between which something is written in place, or the grad mode or autocast changes.
Left alone: what does not run in half precision on a GPU or computes in another dtype than x, higher
ranks than the kernels take, and inputs whose dropout something else needs, as a DoRA's norm does.
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.kernels.dropped_products import MAX_RANK, MOST_SITES, dropped_shrink
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, fake_mode, inherit
from lora_fx.rewrite.surroundings import surroundings

_SEEDS = -(1 << 63), (1 << 63) - 1


def drop_in_kernel(module: GraphModule) -> int:
    """Rewrite every such group of branches; return how many there were."""
    made = 0
    for part in graph_modules(module):
        groups: dict[object, list[Node]] = defaultdict(list)
        around = surroundings(part.graph)
        for node in part.graph.nodes:
            if node.target is ops.shrink and _is_in_kernel(node):
                x, A, p, _ = node.args
                groups[x, p, A.meta[EXAMPLE].shape, dtype(A), around[node]].append(node)
        order = {node: place for place, node in enumerate(part.graph.nodes)}
        for group in groups.values():
            made += sum(_rewrite(part.graph, some) for some in _apart(group, order))
        part.graph.lint()
        part.recompile()
    return made


def _is_in_kernel(shrink: Node) -> bool:
    x, A, p, _ = shrink.args
    of_x, of_A = x.meta[EXAMPLE], A.meta[EXAMPLE]  # type: ignore[union-attr]
    return (
        0 < p < 1  # type: ignore[operator]
        and of_x.ndim > 1
        and of_x.dtype in (torch.bfloat16, torch.float16)
        and dtype(shrink) == of_x.dtype
        and of_A.dtype in (torch.float32, of_x.dtype)
        and of_A.shape[0] <= MAX_RANK
        and of_A.device == of_x.device
        and kernels.are_on(of_x.device.type)
    )


def _apart(group: list[Node], order: dict[Node, int]) -> list[list[Node]]:
    """Part a group: together are those whose factors are there when the first is computed."""
    early = [one for one in group if order[one.args[1]] < order[group[0]]]  # type: ignore[index]
    together = [early[i : i + MOST_SITES] for i in range(0, len(early), MOST_SITES)]
    return [*together, *([one] for one in group if one not in early)]


def _rewrite(graph: Graph, shrinks: list[Node]) -> int:
    x, first, p, _ = shrinks[0].args
    factors: list[Any] = [node.args[1] for node in shrinks]
    before = set(graph.nodes)
    shape = x.meta[EXAMPLE].shape  # type: ignore[union-attr]
    rank = first.meta[EXAMPLE].shape[0]  # type: ignore[union-attr]
    with graph.inserting_before(shrinks[0]):
        seeds = _seeds(graph, x, len(shrinks))
        A = call(graph, torch.cat, factors) if len(factors) > 1 else factors[0]
        rows = call(graph, "flatten", x, 0, -2) if len(shape) != 2 else x
        h = call(graph, dropped_shrink, rows, A, seeds, p)
        if len(shape) != 2:
            outer = [call(graph, "size", x, i) for i in range(len(shape) - 1)]
            h = call(graph, "reshape", h, (*outer, len(shrinks) * rank))
        parts = [h]
        if len(shrinks) > 1:
            split = call(graph, torch.split, h, rank, -1)
            parts = [call(graph, operator.getitem, split, i) for i in range(len(shrinks))]
    known = shrinks[0].meta.get("lora_fx", {}) if len(shrinks) == 1 else {}
    for node in (node for node in graph.nodes if node not in before):
        inherit(node, shrinks[0])
        node.meta["lora_fx"] = {**known, "rule": "drop_in_kernel"}
    for shrink, part in zip(shrinks, parts, strict=True):
        shrink.replace_all_uses_with(part)
        graph.erase_node(shrink)
    return 1


def _seeds(graph: Graph, x: Any, count: int) -> Node:
    with fake_mode((x.meta[EXAMPLE],)):
        return call(graph, torch.randint, *_SEEDS, (count,), device=x.meta[EXAMPLE].device)
