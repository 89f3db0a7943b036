"""Compute the low-rank term of a sum in the kernel that reads the sum. A pass on compiled graphs.

    before   %d = lora_fx.sum_of_products([%dS, %dy], [%A, %W])
             %u = aten.mul(%d, %silu)    …    element by element, then into products
    after    %base = aten.mm(%dy, %W)
             %u, … = lora_fx.elementwise([%base, %g, …], %dS, %A, "v0 = …; return v1, v3")

So the gradient of an activation's output costs no pass of its own over what a low-rank term adds to
it (Hu et al. 2021, §4.1: dx = dy W + s dy B A). What is computed of other tensors on the way, such
as the activation itself, is computed in the same kernel.

Left alone: sums that something else reads too, or whose consumers are more than elementwise, since
what follows would be computed together with those; small sums; what is not half precision on a GPU.
"""

import math
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx.kernels.elementwise import MAX_RANK, OPERATIONS, elementwise
from lora_fx.kernels.sum_of_products import sum_of_products
from lora_fx.passes.aten.nodes import CAST, HALF, VIEWS, args, aten, call, elements, value

_LEAST = 1 << 24  # elements: 32 MiB, beyond what an H100's cache holds with the other operands
_MOST = 4  # operands of a kernel
_BINARY = ("add", "sub", "mul", "div")
_NAMES = {
    getattr(getattr(aten, name), "Tensor" if name in _BINARY else "default"): name
    for name in OPERATIONS
}
_PRODUCTS = (aten.mm.default, aten.addmm.default)


def fuse_low_rank_terms(graph: Graph) -> int:
    """Rewrite every such sum; return how many there were."""
    totals = [node for node in graph.nodes if node.target is sum_of_products and _is_large(node)]
    made = sum(_rewrite(graph, total) for total in totals)
    if made:
        graph.eliminate_dead_code()
    return made


def _is_large(total: Node) -> bool:
    result, factor = value(total), value(args(total)[1][0])
    rank = factor.shape[0]
    return (
        factor.dim() == 2
        and (elements(result) or _LEAST) >= _LEAST
        and isinstance(rank, int)
        and rank <= MAX_RANK
        and result.device.type == "cuda"
        and result.dtype in HALF
    )


def _rewrite(graph: Graph, total: Node) -> bool:
    members = list(_consumers(total))
    inner = {total, *members}
    returned = [one for one in (total, *members) if any(user not in inner for user in one.users)]
    outside = [user for node in returned for user in node.users if user not in inner]
    program = _Program(total)
    order = {node: i for i, node in enumerate(graph.nodes)}
    if (
        not returned
        or not all(_is_result(node, total) for node in returned)
        or not all(map(_is_in_products, outside))
        or not all(program.has(node) for node in returned)
        or len(program.operands) > _MOST
        or not program.lines
    ):
        return False
    first = min(outside, key=order.__getitem__)
    if any(order[one] >= order[first] for one in program.operands):
        return False
    with graph.inserting_before(first):
        base = _without_first(graph, total)
        shape = [_size(graph, base, 0), _size(graph, base, 1)]
        flat = [
            one if value(one).dim() == 2 else call(graph, one, aten.reshape.default, one, shape)
            for one in program.operands[1:]
        ]
        (P, *_), (Q, *_) = args(total)[:2]
        text = program.text(returned)
        results = call(graph, total, elementwise, [base, *flat], P, Q, text)
        for i, node in enumerate(returned):
            node.replace_all_uses_with(call(graph, total, operator.getitem, results, i))
    return True


def _without_first(graph: Graph, total: Node) -> Node:
    """Return the sum without its first, low-rank product."""
    (_, *left), (_, *right), *bias = args(total)
    if len(left) > 1:
        return call(graph, total, sum_of_products, left, right, *bias)
    if bias:
        return call(graph, total, aten.addmm.default, *bias, *left, *right)
    return call(graph, total, aten.mm.default, *left, *right)


def _size(graph: Graph, tensor: Node, dim: int) -> object:
    size = value(tensor).shape[dim]
    return size if isinstance(size, int) else call(graph, tensor, aten.sym_size.int, tensor, dim)


def _consumers(total: Node) -> Iterator[Node]:
    """Yield, in order, what is computed element by element from a sum, and views of it."""
    found = {total}
    node = total.next
    while node.op != "root":
        if not found.isdisjoint(node.all_input_nodes) and _is_elementwise(node, total):
            found.add(node)
            yield node
        node = node.next


def _is_elementwise(node: Node, total: Node) -> bool:
    known = node.target in _NAMES or node.target in VIEWS or node.target is CAST
    return known and not node.kwargs and _is_alike(node, total)


def _is_alike(node: Node, total: Node) -> bool:
    """Whether a value has a sum's columns and as many rows, in whatever dimensions."""
    result, like = node.meta.get("val"), value(total)
    return (
        isinstance(result, torch.Tensor)
        and result.dtype in (like.dtype, torch.float32)
        and result.dim() >= 2
        and statically_known_true(result.shape[-1] == like.shape[1])
        and statically_known_true(result.numel() == like.numel())
    )


def _is_result(node: Node, total: Node) -> bool:
    """Whether a value is one that the kernel can write: a matrix in the dtype of the sum."""
    return value(node).dim() == 2 and value(node).dtype == value(total).dtype


def _is_in_products(user: Node) -> bool:
    """Whether a value is read by products or by our kernels, which nothing is fused into."""
    if user.target is aten.permute.default:
        return all(map(_is_in_products, user.users))
    return user.target in _PRODUCTS or getattr(user.target, "namespace", "") == "lora_fx"


class _Program:
    """The text of what is computed, and the tensors it is computed from; the sum is the first."""

    def __init__(self, total: Node) -> None:
        self.operands = [total]
        self.lines: list[str] = []
        self._total = total
        self._names: dict[Node, str] = {total: "x0"}

    def has(self, node: Node) -> bool:
        """Add what a value is computed by; return False for what cannot be said."""
        return self._name(node) is not None

    def text(self, returned: list[Node]) -> str:
        """Return the program."""
        names = (self._names[node] for node in returned)
        return "; ".join([*self.lines, f"return {', '.join(names)}"])

    def _name(self, node: Node) -> str | None:
        if node not in self._names:
            name = self._computed(node) if _is_elementwise(node, self._total) else self._read(node)
            if name is None:
                return None
            self._names[node] = name
        return self._names[node]

    def _read(self, node: Node) -> str | None:
        if not _is_alike(node, self._total):
            return None
        self.operands.append(node)
        return f"x{len(self.operands) - 1}"

    def _computed(self, node: Node) -> str | None:
        if node.target not in _NAMES:
            return self._name(args(node)[0])
        given = [self._name(one) if isinstance(one, Node) else _number(one) for one in args(node)]
        known = [name for name in given if name is not None]
        if len(known) < len(given):
            return None
        self.lines.append(f"v{len(self.lines)} = {_NAMES[node.target]}({', '.join(known)})")
        return f"v{len(self.lines) - 1}"


def _number(one: float) -> str | None:
    """Return a number as a program has it; there is no infinity in one."""
    return repr(one) if math.isfinite(one) else None
