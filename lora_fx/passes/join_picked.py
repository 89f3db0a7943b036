"""Compute the picked products of all sites with one input in one kernel each, gates included.

    before   %h0 = lora_fx.picked_shrink(%x, [%A0], 1, %which, r, p, d)
             %z0 = lora_fx.picked_expand([%y0], %h0, [%B0], %which, %c, [%f0], d, "")[0]
             %h1 = lora_fx.picked_shrink(%x, [%A1], 1, %which, r, p, d)
             %z1 = lora_fx.picked_expand([%y1], %h1, [%B1], %which, %c, [%f1], d, "")[0]
             %u  = silu(%z0) * %z1
    after    %h  = lora_fx.picked_shrink(%x, [%A0, %A1], 2, %which, r, p, d)
             %z  = lora_fx.picked_expand([%y0, %y1], %h, [%B0, %B1], %which, %c, [%f0, %f1], d, "")
             %z0, %z1 = %z
    and, as nothing else reads them,
             %u  = lora_fx.picked_expand([%y0, %y1], …, d, "silu")[0]

The projections of attention, and those of a gated MLP: a step of decoding is as many launches as
this leaves. Each result is what it was, bit for bit; a gate is computed in float32 and rounded at
its end, as Inductor does it.

Left alone: sites with other adapters, ranks or dtypes, sites of which one needs another's result,
and such between which something is written in place, or the grad mode or autocast changes.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lora_fx.kernels.picked_products import picked_expand, picked_shrink
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, inherit
from lora_fx.rewrite.surroundings import surroundings


def join_picked(module: GraphModule) -> int:
    """Join what can be joined; return how many sites became part of another's kernels."""
    joined = 0
    for part in graph_modules(module):
        while (found := _next_group(part.graph)) is not None:
            group, late = found
            _through_gate(part.graph, _join(part.graph, group, late))
            joined += len(group) - 1
        part.graph.lint()
        part.recompile()
    return joined


def _next_group(graph: Graph) -> tuple[list[Node], list[Node]] | None:
    """Return the first sites that can be joined, and what then has to wait for them; in order."""
    around = surroundings(graph)
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is picked_expand:
            groups[*_key(node), around[_shrink(node)], around[node]].append(node)
    for group in (some for some in groups.values() if len(some) > 1):
        late = list(_late(graph, group))
        alike = all(around[node] == around[group[-1]] for node in (_shrink(group[0]), *late))
        if alike and not any(node in group for node in late):
            return group, late
    return None


def _key(expand: Node) -> Any:
    """Return what sites have in common that can be joined."""
    of_expand: tuple[Any, ...] = expand.args
    of_shrink: tuple[Any, ...] = _shrink(expand).args
    (y, *_), h, B, which, shares, _, wanted, gate = of_expand
    x, A, sites, _, *how = of_shrink
    ranks = tuple(factor.meta[EXAMPLE].shape[:-1] for factor in A)
    types = dtype(y), *map(dtype, (A[0], B[0]))
    return x, ranks, types, sites, *how, h.target, which, shares, wanted, gate


_OURS = (picked_shrink, picked_expand, torch.sum, operator.getitem)


def _shrink(expand: Node) -> Node:
    h = expand.args[1]
    return h if h.target is picked_shrink else h.args[0]  # type: ignore[union-attr,return-value]


def _late(graph: Graph, group: list[Node]) -> Iterator[Node]:
    """Yield, in order, what has to wait for the last of a group: what needs another of it."""
    needs = set(group[:-1])
    nodes = iter(graph.nodes)
    for node in nodes:
        if node is group[-1]:
            break
        if not needs.isdisjoint(node.all_input_nodes):
            needs.add(node)
            yield node
    if not needs.isdisjoint(group[-1].all_input_nodes):
        yield group[-1]


def _join(graph: Graph, group: list[Node], late: list[Node]) -> Node:
    """Put one in the place of the last, and behind it what has to wait for it; return it."""
    last = group[-1]
    shrinks = [_shrink(node) for node in group]
    of_expand: tuple[Any, ...] = group[0].args
    of_shrink: tuple[Any, ...] = shrinks[0].args
    (x, _, _, _, *how), (_, _, _, which, shares, _, wanted, gate) = of_shrink, of_expand
    of = {i: _listed(group, i) for i in (0, 2, 5)}
    before = set(graph.nodes)
    with graph.inserting_before(last):
        A = _listed(shrinks, 1)
        h = call(graph, picked_shrink, x, A, len(group), which, *how)
        if group[0].args[1] is not shrinks[0]:
            h = call(graph, torch.sum, h, 1, True)
        joined = call(graph, picked_expand, of[0], h, of[2], which, shares, of[5], wanted, gate)
        results = [call(graph, operator.getitem, joined, i) for i in range(len(group))]
    for node in graph.nodes:
        if node not in before:
            inherit(node, last)
            node.meta["lora_fx"] = {**last.meta.get("lora_fx", {}), "rule": "join_picked"}
    replaced = [item for node in group for item in node.users or [node]]
    for node, result in zip(group, results, strict=True):
        for item in node.users:
            item.replace_all_uses_with(result)
    for node in reversed(late):
        if node not in replaced:
            last.append(node)
    for node in replaced:
        _erase(graph, node)
    return joined


def _listed(nodes: list[Node], place: int) -> list[Any]:
    """Return what is in the lists that some nodes have in one place."""
    lists: list[Any] = [node.args[place] for node in nodes]
    return [one for some in lists for one in some]


def _through_gate(graph: Graph, joined: Node) -> None:
    """Let a kernel go through a gate, where nothing else reads the two results."""
    of_expand: tuple[Any, ...] = joined.args
    y, h, B, which, shares, scalings, wanted, _ = of_expand
    results = [node for _, node in sorted((node.args[1], node) for node in joined.users)]
    if len(results) != 2 or any(len(node.users) != 1 for node in results):
        return
    if y[0].meta[EXAMPLE].shape != y[1].meta[EXAMPLE].shape:
        return
    for first, second in (results, results[::-1]):
        activation, product = *first.users, *second.users
        gate = _gate_of(activation)
        both = {activation, second}
        if gate is None or set(activation.users) != {product} or not _is_product(product, both):
            continue
        if first.args[1] == 1:
            y, B, scalings = _swapped(y), _swapped(B), _swapped(scalings)
            _swap_sites(h)
        with graph.inserting_before(product):
            how = which, shares, scalings, wanted, gate
            through = call(graph, picked_expand, y, h, B, *how)
            result = call(graph, operator.getitem, through, 0)
        for node in (through, result):
            inherit(node, product)
            node.meta["lora_fx"] = joined.meta["lora_fx"]
        product.replace_all_uses_with(result)
        graph.erase_node(product)
        graph.erase_node(activation)
        for node in results:
            if not node.users:
                _erase(graph, node)
        return


def _erase(graph: Graph, node: Node) -> None:
    """Erase a node of ours, and what nothing reads then of what it was computed from."""
    given = node.all_input_nodes
    graph.erase_node(node)
    for one in given:
        if not one.users and one.target in _OURS:
            _erase(graph, one)


def _gate_of(node: Node) -> str | None:
    """Return the name of a gate, of what computes one."""
    if node.target in (F.silu, torch.ops.aten.silu.default) and not node.kwargs.get("inplace"):
        return "silu"
    if node.target is F.gelu:
        how = node.kwargs.get("approximate", (*node.args, "none")[1])
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(how))
    return None


def _is_product(node: Node, of: set[Node]) -> bool:
    is_mul = node.target in (operator.mul, torch.mul, "mul")
    return is_mul and len(node.args) == 2 and set(node.args) == of and not node.kwargs


def _swapped(each: Any) -> list[Any]:
    half = len(each) // 2
    return [*each[half:], *each[:half]]


def _swap_sites(h: Node) -> None:
    shrink: Any = h if h.target is picked_shrink else h.args[0]
    shrink.args = (shrink.args[0], _swapped(shrink.args[1]), *shrink.args[2:])
