"""Let the matrix products of a sum add themselves up. A pass on compiled graphs, both directions.

    before   %base = aten.mm(%x, %Wt)              after   %y = lora_fx.sum_of_products(
             %delta = aten.mm(%h, %Bt)                              [%h, %x], [%Bt, %Wt])
             %y = aten.add(%base, %delta)

A sum may have more terms, reshapes between the products and itself, a bias, terms that are no
products, which stay added, and such that are products of each sample (`bmm`). So a base output is
joined with its branches, and so are the gradients of an input that several layers share (Hu et al.
2021, §4.1: dx = dy W + s dy B A). The products go from the smallest inner dimension to the largest,
which reads what it adds while it multiplies.

Left alone: sums so small that launching is what they cost, products and partial sums that something
else reads too, and sums of different dtypes.
"""

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx.kernels.sum_of_products import sum_of_products
from lora_fx.passes.aten.nodes import VIEWS, args, aten, call, elements, same_size, value

_ADD = aten.add.Tensor
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
_LEAST = 1 << 23  # elements: 16 MiB, which an H100 reads in 5 µs


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
    products = _products(terms)
    whole = [term for term, product in products.items() if value(product).dim() == 2]
    if not whole or len(products) < 2 or (elements(value(total)) or _LEAST) < _LEAST:
        return False
    with graph.inserting_before(total):
        result = _sum(graph, list(products.values()))
        some = whole[0]
        if some.target in VIEWS:
            result = call(graph, some, aten.reshape.default, result, args(some)[1])
        for term in terms:
            if term not in products:
                result = call(graph, total, _ADD, result, term)
    total.replace_all_uses_with(result)
    graph.erase_node(total)
    return True


def _products(terms: list[Node]) -> dict[Node, Node]:
    """Return the products among the terms that can share a buffer: at most one has a bias."""
    found: dict[Node, Node] = {}
    biased = False
    for term in terms:
        product = _product(term)
        if product is None or (biased and _has_bias(product)):
            continue
        if all(_has_rows_of(value(product), value(other)) for other in found.values()):
            found[term] = product
            biased = biased or _has_bias(product)
    return found


def _has_rows_of(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two products of as many elements are the same matrix, but for how rows are parted."""
    if one.dim() == other.dim():
        return same_size(one, other)
    return statically_known_true(one.shape[-1] == other.shape[-1])


def _has_bias(product: Node) -> bool:
    return product.target is aten.addmm.default


def _sum(graph: Graph, products: list[Node]) -> Node:
    factors = sorted((args(product)[-2:] for product in products), key=_place)
    bias = [args(p)[0] for p in products if _has_bias(p)]
    left, right = map(list, zip(*factors, strict=True))
    return call(graph, products[0], sum_of_products, left, right, *bias)


def _terms(total: Node) -> Iterator[Node]:
    """Yield what a sum adds up, through partial sums that nothing else reads."""
    for term in args(total):
        if _is_sum(term) and _is_partial(term):
            yield from _terms(term)
        else:
            yield term


def _is_sum(node: Node) -> bool:
    """Whether two tensors of one shape and floating dtype are added, and neither is scaled."""
    if node.target is not _ADD or node.kwargs or args(node)[0] is args(node)[1]:
        return False
    result, *terms = (value(n) for n in (node, *args(node)) if isinstance(n, Node))
    return (
        len(terms) == 2
        and result.is_floating_point()
        and all(isinstance(v, torch.Tensor) and v.dtype == result.dtype for v in terms)
        and all(same_size(v, result) for v in terms)
    )


def _is_partial(total: Node) -> bool:
    return len(total.users) == 1 and _is_sum(*total.users)


def _product(term: Node) -> Node | None:
    """Return the matrix product that a term is, or a reshape of, if nothing else reads it."""
    while term.target in VIEWS and len(term.users) == 1:
        term = args(term)[0]
    known = term.target in _PRODUCTS and not term.kwargs and len(term.users) == 1
    if not known or (_has_bias(term) and value(args(term)[0]).dim() != 1):
        return None
    return term


def _place(factors: tuple[Node, Node]) -> tuple[bool, int]:
    """Put a product with a small inner dimension first, one that is not known last.

    Those of each sample come before the others.
    """
    size = value(factors[1]).shape[-2]
    return value(factors[1]).dim() == 2, size if isinstance(size, int) else 1 << 62
