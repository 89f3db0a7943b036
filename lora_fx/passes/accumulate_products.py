"""Let the matrix products of a sum add themselves up. A pass on compiled graphs, both directions.

    before   %base = aten.mm(%x, %Wt)              after   %y = lora_fx.sum_of_products(
             %delta = aten.mm(%h, %Bt)                              [%h, %x], [%Bt, %Wt])
             %y = aten.add(%base, %delta)

A sum may have more terms, reshapes between the products and itself, a bias, and terms that are no
products, which stay added. So a base output is joined with its branches, and so are the gradients
of an input that several layers share (Hu et al. 2021, §4.1: dx = dy W + s dy B A). The products go
from the smallest inner dimension to the largest, which reads what it adds while it multiplies.

Left alone: products and partial sums that something else reads too, and sums of different dtypes.
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx.kernels.sum_of_products import sum_of_products

_aten = torch.ops.aten
_ADD = _aten.add.Tensor
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_VALUE = "val"


def accumulate_products(graph: Graph) -> int:
    """Rewrite every sum of two products or more; return how many there were."""
    made = 0
    for node in reversed(list(graph.nodes)):
        if node.users and _is_sum(node) and not _is_partial(node):
            made += _rewrite(graph, node)
    if made:
        graph.eliminate_dead_code()
    return made


def _rewrite(graph: Graph, total: Node) -> bool:
    terms = list(_terms(total))
    products = {term: product for term in terms if (product := _product(term)) is not None}
    alike = {t: p for t, p in products.items() if _same_shape(p, next(iter(products.values())))}
    biased = [term for term, product in alike.items() if product.target is _aten.addmm.default]
    for term in biased[1:]:
        del alike[term]
    if len(alike) < 2:
        return False
    with graph.inserting_before(total):
        value = _sum(graph, list(alike.values()))
        some = next(iter(alike))
        if some.target in _VIEWS:
            value = _call(graph, some, _aten.reshape.default, value, some.args[1])
        for term in terms:
            if term not in alike:
                value = _call(graph, total, _ADD, value, term)
    total.replace_all_uses_with(value)
    graph.erase_node(total)
    return True


def _sum(graph: Graph, products: list[Node]) -> Node:
    factors = sorted((product.args[-2:] for product in products), key=_inner)
    bias = [p.args[0] for p in products if p.target is _aten.addmm.default]
    left, right = map(list, zip(*factors, strict=True))
    return _call(graph, products[0], sum_of_products, left, right, *bias)


def _terms(total: Node) -> Iterator[Node]:
    """Yield what a sum adds up, through partial sums that nothing else reads."""
    for term in total.args:
        if _is_sum(term) and _is_partial(term):  # type: ignore[arg-type, union-attr]
            yield from _terms(term)  # type: ignore[arg-type]
        else:
            yield term  # type: ignore[misc]


def _is_sum(node: Node) -> bool:
    """Whether two tensors of one shape and floating dtype are added, and neither is scaled."""
    if node.target is not _ADD or node.kwargs:
        return False
    values = [node.meta[_VALUE], *(a.meta[_VALUE] for a in node.args if isinstance(a, Node))]
    return (
        len(values) == 3
        and all(isinstance(v, torch.Tensor) and v.dtype == values[0].dtype for v in values)
        and values[0].is_floating_point()
        and all(_equal(v.shape, values[0].shape) for v in values)
    )


def _is_partial(total: Node) -> bool:
    return len(total.users) == 1 and _is_sum(*total.users)


def _product(term: Node) -> Node | None:
    """Return the matrix product that a term is, or a reshape of, if nothing else reads it."""
    while term.target in _VIEWS and len(term.users) == 1:
        term = term.args[0]  # type: ignore[assignment]
    known = term.target in _PRODUCTS and not term.kwargs and len(term.users) == 1
    if not known or (len(term.args) == 3 and term.args[0].meta[_VALUE].dim() != 1):  # type: ignore[union-attr]
        return None
    return term


def _inner(factors: tuple[Node, Node]) -> int:
    """Return a product's inner dimension; one that is not known goes last."""
    size = factors[1].meta[_VALUE].shape[0]
    return size if isinstance(size, int) else 1 << 62


def _same_shape(one: Node, other: Node) -> bool:
    return _equal(one.meta[_VALUE].shape, other.meta[_VALUE].shape)


def _equal(one: torch.Size, other: torch.Size) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in pairs)


def _call(graph: Graph, like: Node, target: object, *args: object) -> Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {**like.meta}
    return node
