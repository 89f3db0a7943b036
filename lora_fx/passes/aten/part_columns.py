"""Let gradients that lie side by side lie one after another. A pass on compiled graphs.

    before   %d0 = aten.slice(%dB, 1, 0, r)         dB: (out, N r), as factors side by side have it
             %d1 = aten.slice(%dB, 1, r, 2 r)
             return (%d0, %d1, …)
    after    %parts = aten.clone(aten.permute(aten.reshape(%dB, [out, N, r]), [1, 0, 2]))
             %d0 = aten.select(%parts, 0, 0)
             %d1 = aten.select(%parts, 0, 1)

Autograd keeps a gradient as it is if its memory is laid out as the parameter's, and copies any
other, one by one: in a mixed batch, each adapter's of each site. So all of a site are copied at
once, together with what computes them.

Left alone: slices of different widths, such that are no results of the graph, and those of what
something else reads too. And all of forward graphs, where results may have to share memory: a
backward graph is one with arguments that AOTAutograd names `tangents`;
`tests/passes/aten/test_part_columns.py` holds it.
"""

from collections import defaultdict

import torch
from torch.fx import Graph, Node

from lora_fx.passes.aten.nodes import args, aten, call, value


def part_columns(graph: Graph) -> int:
    """Rewrite the results that are columns of one matrix; return of how many matrices."""
    given = graph.find_nodes(op="placeholder")
    if not any(str(node.target).startswith("tangents") for node in given):
        return 0
    groups: dict[Node, set[Node]] = defaultdict(set)
    output = graph.output_node()
    for node in output.all_input_nodes:
        if _is_columns(node):
            groups[args(node)[0]].add(node)
    return sum(_rewrite(graph, whole, columns, output) for whole, columns in groups.items())


def _is_columns(node: Node) -> bool:
    if node.target is not aten.slice.Tensor or len(args(node)) != 4 or args(node)[1] != 1:
        return False
    sizes = (*value(args(node)[0]).shape, *args(node)[2:])
    return value(node).dim() == 2 and all(isinstance(size, int) for size in sizes)


def _rewrite(graph: Graph, whole: Node, columns: set[Node], output: Node) -> bool:
    (rows, total), (width, *others) = value(whole).shape, {value(c).shape[1] for c in columns}
    starts = [args(one)[2] for one in columns]
    if others or len(columns) < 2 or total % width or any(start % width for start in starts):
        return False
    if whole.op == "placeholder" or not columns.issuperset(whole.users):
        return False
    with graph.inserting_before(min(columns)):
        apart = call(graph, whole, aten.reshape.default, whole, [rows, total // width, width])
        apart = call(graph, whole, aten.permute.default, apart, [1, 0, 2])
        how = {"memory_format": torch.contiguous_format}
        apart = call(graph, whole, aten.clone.default, apart, **how)
        for one in columns:
            part = call(graph, one, aten.select.int, apart, 0, args(one)[2] // width)
            one.replace_all_uses_with(part, lambda user: user is output)
    for one in columns:
        if not one.users:
            graph.erase_node(one)
    return True
