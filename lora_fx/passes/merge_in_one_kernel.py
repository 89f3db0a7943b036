"""Merge on a GPU in one kernel: W is read once and W' written once, and no product beside them.

    before   %wide = %W.to(float32)
             %d = lora_fx.delta(%wide, %A, %B, %s, False)
             %w = %d.to(bfloat16)
    after    %P = %B * %s
             %w = lora_fx.elementwise([%W], %P, %A, "return x0")[0]

W' = W + s B A, added in float32 and rounded once, as before (`kernels/elementwise.py`). A sum of
ranks beyond the kernel's stays as it is, as does what is added in float64.
"""

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.graph import ops
from lora_fx.kernels.elementwise import MAX_RANK, elementwise
from lora_fx.passes.casts import cast
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, inherit


def merge_in_one_kernel(module: GraphModule) -> int:
    """Put the kernel where deltas are added, in place; return how many there were."""
    found = 0
    for part in graph_modules(module):
        for delta in [node for node in part.graph.nodes if _fits(node)]:
            _replace(part.graph, delta)
            found += 1
        part.graph.eliminate_dead_code()
        part.graph.lint()
        part.recompile()
    return found


def _fits(node: Node) -> bool:
    if node.target is not ops.delta or dtype(node) is not torch.float32:
        return False
    return node.args[1].meta[EXAMPLE].shape[0] <= MAX_RANK  # type: ignore[union-attr]


def _replace(graph: Graph, delta: Node) -> None:
    weight, A, B, scaling, transposed = delta.args
    source, last = _source(weight), delta  # type: ignore[arg-type]
    cast_back = [user for user in delta.users if _is_cast(user) and dtype(user) == dtype(source)]
    if len(delta.users) == len(cast_back) == 1:
        last = cast_back[0]
    elif source is not weight:
        source = weight  # type: ignore[assignment]
    before = set(graph.nodes)
    with graph.inserting_before(last):
        A, B = cast(graph, A, torch.float32), cast(graph, B, torch.float32)
        B = B if scaling is None else call(graph, torch.mul, B, scaling)
        factors = (call(graph, "t", A), call(graph, "t", B)) if transposed else (B, A)
        results = call(graph, elementwise, [source], *factors, "return x0")
        value = call(graph, operator.getitem, results, 0)
    for node in graph.nodes:
        if node not in before:
            inherit(node, delta)
    last.replace_all_uses_with(value)


def _source(weight: Node) -> Node:
    """Return what a weight was before it was cast."""
    return weight.args[0] if _is_cast(weight) else weight  # type: ignore[return-value]


def _is_cast(node: Node | None) -> bool:
    return node is not None and node.op == "call_method" and node.target == "to"
