"""Read the gradient of an output once for both gradients of its branch. A pass on compiled graphs.

    before   %dh = aten.mm(%dy, %B)                after   %p, %q = lora_fx.expand_backward(
             %dB = aten.mm(%dyᵀ, %h)                            %dy, %B, %h)
                                                           %dh = sum(%p, 0)   %dB = sum(%q, 0)

dy (m, n) is by far the largest of these tensors, and each product takes as long as reading it.
Left alone: a dy that the GPU's cache holds, so that the second read is cheap; ranks above
`MAX_RANK`, whose partial sums are no longer small beside dy; what does not run in half precision on
a GPU; and factors that come later than a product is needed.
"""

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from lora_fx.kernels.expand_backward import MAX_RANK, expand_backward
from lora_fx.passes.aten.nodes import CAST, HALF, args, aten, call, elements, value

_MM = aten.mm.default
_CACHED = 1 << 24  # elements: 32 MiB, most of the cache of 50 that an H100 has


def share_gradient_reads(graph: Graph) -> int:
    """Rewrite every such pair of products; return how many there were."""
    pairs = [pair for node in graph.nodes for pair in _pairs(node)]
    made = sum(_rewrite(graph, *pair) for pair in pairs)
    if made:
        graph.eliminate_dead_code()
    return made


def _pairs(dy: Node) -> Iterator[tuple[Node, Node]]:
    """Yield products `dy B` and `dyᵀ h` whose small factors have one rank."""
    if not _is_large(dy):
        return
    left = [user for user in dy.users if _is_small_product(user, dy)]
    transposed = [user for user in dy.users if user.target is aten.permute.default]
    for dB in (user for t in transposed for user in t.users if _is_small_product(user, t)):
        dh = next((one for one in left if _rank(one) == _rank(dB)), None)
        if dh is not None:
            left.remove(dh)
            yield dh, dB


def _is_large(dy: Node) -> bool:
    result = dy.meta.get("val")
    if not isinstance(result, torch.Tensor) or result.dim() != 2:
        return False
    return (elements(result) or _CACHED) >= _CACHED


def _is_small_product(node: Node, left: Node) -> bool:
    if node.target is not _MM or args(node)[0] is not left:
        return False
    result = value(node)
    small = isinstance(_rank(node), int) and _rank(node) <= MAX_RANK
    return small and result.device.type == "cuda" and result.dtype in HALF


def _rank(product: Node) -> int:
    return value(product).shape[1]


def _rewrite(graph: Graph, dh: Node, dB: Node) -> bool:
    order = {node: i for i, node in enumerate(graph.nodes)}
    dy, B, h = args(dh)[0], args(dh)[1], args(dB)[1]
    last: Node = max((dy, B, h), key=order.__getitem__)
    computed = (node for node in graph.nodes if node.op != "placeholder" and node in order)
    following = next(node for node in computed if order[node] > order[last])
    if any(order[user] < order[following] for product in (dh, dB) for user in product.users):
        return False
    with graph.inserting_before(following):
        both = call(graph, dh, expand_backward, dy, B, h)
        for i, product in enumerate((dh, dB)):
            part = call(graph, product, operator.getitem, both, i)
            total = call(graph, product, aten.sum.dim_IntList, part, [0])
            product.replace_all_uses_with(call(graph, product, CAST, total, value(product).dtype))
    return True
