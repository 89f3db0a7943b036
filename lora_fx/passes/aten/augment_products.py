"""Compute a layer and its branches in one product, where the weight has room for B beside it.

    before   %q = lora_fx.sum_of_products([%hq, %x], [%Bqᵀ, %Wqᵀ])
             %k = lora_fx.sum_of_products([%hk, %x], [%Bkᵀ, %Wkᵀ])
    after    %xa = aten.cat([%x, 0], 1)                                    (m, in + ROOM)
             %q, %k = lora_fx.augmented_products(
                 %xa, [%hq, %hk], [%Wq, %Wk], [[%Bq | 0 | 0], [0 | %Bk | 0]], …)

A pass on compiled graphs, after `accumulate_products`. The branches of all layers that share an
input lie beside it, each layer's B is zero in the others' columns. What writes x writes it into xa.
Left alone: weights without room (`graph/room.py`), ranks that add up to more than there is room
for, and an x that is not computed element by element, which would be copied.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from lora_fx.graph.room import ROOM, has_room
from lora_fx.kernels.augmented_products import augmented_products
from lora_fx.kernels.sum_of_products import sum_of_products
from lora_fx.passes.aten.nodes import CAST, VIEWS, args, aten, call, value

_CHEAP = (*VIEWS, CAST, aten.mul.Tensor, aten.select.int)  # of an adapter's factors


def augment_products(graph: Graph) -> int:
    """Rewrite the sums of each input; return how many inputs there were."""
    groups: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is sum_of_products and _has_room(node):
            groups[args(node)[0][-1]].append(node)
    made = sum(_rewrite(graph, x, sums) for x, sums in groups.items() if _is_computed(x))
    if made:
        graph.eliminate_dead_code()
    return made


def _has_room(product: Node) -> bool:
    *factors, weight = args(product)[1]
    return (
        all(_is_transposed(one) for one in (*factors, weight))
        and args(weight)[0].op == "placeholder"
        and has_room(value(args(weight)[0]))
    )


def _is_transposed(node: Node) -> bool:
    return node.target is aten.permute.default and list(args(node)[1]) == [1, 0]


def _is_computed(x: Node) -> bool:
    """Whether x is made element by element, in the columns and not by the strides it is read by."""
    base = _computed(x)
    pointwise = torch.Tag.pointwise in getattr(base.target, "tags", ())
    by_strides = any(user.target is aten.as_strided.default for user in (*base.users, *x.users))
    return pointwise and not by_strides and value(base).shape[-1] == value(x).shape[-1]


def _rewrite(graph: Graph, x: Node, sums: list[Node]) -> bool:
    order = {node: i for i, node in enumerate(graph.nodes)}
    hidden = [h for product in sums for h in args(product)[0][:-1]]
    factors = [args(one)[0] for product in sums for one in args(product)[1][:-1]]
    if sum(map(_rank, hidden)) > ROOM:
        return False
    biases = [args(product)[2] if len(args(product)) > 2 else None for product in sums]
    needed = (*hidden, *factors, *filter(None, biases))
    if not all(_comes_before(one, sums[0], order) for one in needed):
        return False
    with graph.inserting_before(sums[0]):
        weights = [args(args(product)[1][-1])[0] for product in sums]
        xa, room = _with_room(graph, x)
        _fill(graph, room, hidden)
        wide = list(_columns(graph, sums))
        results = call(graph, sums[0], augmented_products, xa, weights, wide, biases)
        for i, product in enumerate(sums):
            product.replace_all_uses_with(call(graph, product, operator.getitem, results, i))
    return True


def _with_room(graph: Graph, x: Node) -> tuple[Node, Node]:
    """Let x be the first columns of a wider matrix; return that, and the room beside x."""
    columns = value(x).shape[1]
    like = {"dtype": value(x).dtype, "device": value(x).device}
    with graph.inserting_before(x.next):
        size = [_size(graph, x, 0), columns + ROOM]
        xa = call(graph, x, aten.empty.memory_format, size, **like)
        left = call(graph, x, aten.slice.Tensor, xa, 1, 0, columns)
        own = call(graph, x, aten.copy_.default, left, x)
        room = call(graph, x, aten.slice.Tensor, xa, 1, columns, columns + ROOM)
    x.replace_all_uses_with(own, lambda user: user is not own and user is not size[0])
    return xa, room


def _fill(graph: Graph, room: Node, hidden: list[Node]) -> None:
    """Lay h beside x, and zeros beside h."""
    joined = _joined(hidden) or call(graph, room, aten.cat.default, hidden, 1)
    padded = call(graph, room, aten.constant_pad_nd.default, joined, [0, ROOM - _rank(joined)])
    call(graph, room, aten.copy_.default, room, padded)


def _joined(hidden: list[Node]) -> Node | None:
    """Return the matrix whose columns these are, from the first to the last."""
    parts = [_computed(h) for h in hidden]
    if len(hidden) == 1:
        return hidden[0]
    splits = {args(part)[0] for part in parts if part.target is operator.getitem}
    if len(splits) != 1 or [args(part)[1:] for part in parts] != [(i,) for i in range(len(parts))]:
        return None
    split = splits.pop()
    whole = _computed(args(split)[0])
    complete = value(whole).dim() == 2 and _rank(whole) == sum(map(_rank, hidden))
    return whole if split.target is aten.split_with_sizes.default and complete else None


def _size(graph: Graph, tensor: Node, dim: int) -> object:
    size = value(tensor).shape[dim]
    return size if isinstance(size, int) else call(graph, tensor, aten.sym_size.int, tensor, dim)


def _computed(x: Node) -> Node:
    while x.target in VIEWS:
        x = args(x)[0]
    return x


def _comes_before(node: Node, first: Node, order: dict[Node, int]) -> bool:
    """Whether a value is there when `first` needs it; what is cheap to make is brought forward."""
    if order[node] < order[first]:
        return True
    inputs = node.all_input_nodes
    if (
        node.op != "call_function"
        or node.target not in _CHEAP
        or not all(_comes_before(one, first, order) for one in inputs)
    ):
        return False
    first.prepend(node)
    order[node] = order[first] - 1
    return True


def _columns(graph: Graph, sums: list[Node]) -> Iterator[Node]:
    """Lay each layer's factors in the columns of their h; the other columns are zero."""
    start = 0
    for product in sums:
        factors = [args(one)[0] for one in args(product)[1][:-1]]
        B = factors[0]
        if len(factors) > 1:
            B = call(graph, factors[0], aten.cat.default, factors, 1)
        width = _rank(B)
        room = [start, ROOM - start - width]
        yield call(graph, product, aten.constant_pad_nd.default, B, room)
        start += width


def _rank(factor: Node) -> int:
    return value(factor).shape[1]
