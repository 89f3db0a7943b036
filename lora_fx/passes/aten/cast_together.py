"""Cast all of a graph's adapter factors in one kernel. A pass on compiled graphs, on a GPU.

    before   %a = convert(%A, bf16)        after   %all = cat([flat(convert(%A, bf16)),
             %b = convert(%B * %s, bf16)                       flat(convert(%B * %s, bf16)), …])
             …                                     %a = %all[:r·in] as (r, in)
                                                   %b = …

Factors are float32 and small, and a layer has a dozen or more: each cast of its own takes as long
to launch as to run. Only inputs of the graph are cast so, also scaled or stacked ones; all of it
happens before anything else, so that no product waits.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from lora_fx.passes.aten.nodes import call, value

LARGEST = 1 << 21  # elements; of a larger tensor the cast is worth a launch
_aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_HALF = (torch.bfloat16, torch.float16)


def cast_together(graph: Graph) -> int:
    """Join the casts to each dtype; return how many joined casts were made."""
    groups: dict[torch.dtype, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is _CAST and _is_small_on_gpu(node) and _is_of_inputs(node):
            groups[value(node).dtype].append(node)
    joined = [casts for casts in groups.values() if len(casts) > 1]
    for casts in joined:
        _join(graph, casts)
    if joined:
        graph.eliminate_dead_code()
    return len(joined)


def _is_small_on_gpu(cast: Node) -> bool:
    result, source = value(cast), value(cast.args[0])
    return (
        result.device.type == "cuda"
        and source.dtype == torch.float32
        and result.dtype in _HALF
        and all(isinstance(size, int) for size in result.shape)
        and result.numel() <= LARGEST
        and result.is_contiguous()
    )


def _is_of_inputs(node: Node) -> bool:
    """Whether a value is an input of the graph, an entry of one, or those scaled or stacked."""
    if node.target is _aten.select.int:
        return node.args[0].op == "placeholder"  # type: ignore[union-attr]
    known = node.target in (_CAST, _aten.mul.Tensor) or _is_stack(node)
    return node.op == "placeholder" or (known and all(map(_is_of_inputs, node.all_input_nodes)))


def _is_stack(node: Node) -> bool:
    return node.target is _aten.cat.default and node.args[1:] in ((), (0,))


def _join(graph: Graph, casts: list[Node]) -> None:
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        together = call(graph, casts[0], _aten.cat.default, [p for c in casts for p in _flat(c)])
        start = 0
        for cast in casts:
            shape = list(value(cast).shape)
            end = start + math.prod(shape)
            part = call(graph, cast, _aten.slice.Tensor, together, 0, start, end)
            cast.replace_all_uses_with(call(graph, cast, _aten.reshape.default, part, shape))
            start = end


def _flat(cast: Node) -> Iterator[Node]:
    """Build the cast's values in a row, in pieces: one for each tensor that it stacks."""
    source: Node = cast.args[0]  # type: ignore[assignment]
    for piece in source.args[0] if _is_stack(source) else [source]:  # type: ignore[union-attr]
        converted = call(cast.graph, cast, _CAST, _copy(piece), value(cast).dtype)  # type: ignore[arg-type]
        yield call(cast.graph, cast, _aten.reshape.default, converted, [-1])


def _copy(node: Node) -> Node:
    return node if node.op == "placeholder" else node.graph.node_copy(node, _copy)
