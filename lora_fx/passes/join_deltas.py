"""Read and write a weight once for all the deltas that are added to it.

    before   %d0 = lora_fx.delta(%W, %A0, %B0, %s0, t)
             %d1 = lora_fx.delta(%d0, %A1, %B1, %s1, t)
    after    %A = torch.cat([%A0, %A1])                 (r0 + r1, in)
             %B = torch.cat([%B0 * %s0, %B1 * %s1], 1)  (out, r0 + r1)
             %d1 = lora_fx.delta(%W, %A, %B, None, t)

W + s₀B₀A₀ + s₁B₁A₁ = W + [s₀B₀ s₁B₁] [A₀; A₁], one product of the summed rank.
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.graph import ops
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import call, dtype, inherit


def join_deltas(module: GraphModule) -> int:
    """Join each chain of deltas; return how many joined deltas were made."""
    joined = 0
    for part in graph_modules(module):
        for last in [node for node in part.graph.nodes if _ends_chain(node)]:
            chain = list(_chain(last))[::-1]
            if len(chain) > 1:
                _join(part.graph, chain)
                joined += 1
        part.graph.lint()
        part.recompile()
    return joined


def _ends_chain(node: Node) -> bool:
    return node.target is ops.delta and not any(user.target is ops.delta for user in node.users)


def _chain(node: Node) -> Iterator[Node]:
    yield node
    before = node.args[0]
    if isinstance(before, Node) and before.target is ops.delta and len(before.users) == 1:
        yield from _chain(before)


def _join(graph: Graph, chain: list[Node]) -> None:
    first, last = chain[0], chain[-1]
    weight, transposed = first.args[0], first.args[4]
    wide = dtype(weight)
    before = set(graph.nodes)
    with graph.inserting_before(last):
        As = [_cast(graph, delta.args[1], wide) for delta in chain]
        Bs = [_scaled(graph, delta, wide) for delta in chain]
        A, B = call(graph, torch.cat, As), call(graph, torch.cat, Bs, 1)
        value = call(graph, ops.delta, weight, A, B, None, transposed)
    for node in graph.nodes:
        if node not in before:
            inherit(node, last)
            node.meta["lora_fx"] = {**last.meta.get("lora_fx", {}), "rule": "join_deltas"}
    last.replace_all_uses_with(value)
    for delta in reversed(chain):
        graph.erase_node(delta)


def _scaled(graph: Graph, delta: Node, wide: torch.dtype) -> Node:
    B = _cast(graph, delta.args[2], wide)
    return call(graph, torch.mul, B, delta.args[3])


def _cast(graph: Graph, node: object, wanted: torch.dtype) -> object:
    return node if dtype(node) == wanted else call(graph, "to", node, wanted)
