"""Turn what samples compute with their own factors into torch operators; on a CPU `pick` stays.

    choose(samples, columns, k)       →  where(gather(c, p) == 0, -1, p), where c are the columns of
                                         samples and p is topk(abs(c), k), or argmax
    pick(factors, which, r, columns)  →  on a GPU `picked_on_device`, in the dtype of its product
    sample_scalings(…, which)         →  where(which < 0, 0, gather(c, p) * scalings[p])
    sample_shrink(x, A, p, compute)   →  bmm(dropout(x, p).to(d), A.to(d)ᵀ)
    sample_expand(y, h, B, f, c)      →  y + bmm((h * f).to(d), B.to(d)ᵀ).to(y.dtype)
        or, if B is cast to fewer bits  →  y + bmm(h.to(d), (B * f).to(d)ᵀ).to(y.dtype)
    spread(values, columns, ranks)    →  cat(flatten(expand(unsqueeze(narrow(values, -1, …), -1))))
    masked_expand(y, h, B, s, c)      →  y + linear((h * s * c).to(d), B.to(d)).to(y.dtype)
        or, if B is cast to fewer bits  →  y + linear((h * c).to(d), (B * s).to(d)).to(y.dtype)
    take(stack, which, columns)       →  flatten(masked_fill(index_select(stack, 0, …), …, 0))

`graph/sample_references.py` says what they compute.
"""

import operator

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.picked import pick, picked_on_device
from lora_fx.graph.sample_references import runs
from lora_fx.graph.structure import compute_dtype
from lora_fx.passes.casts import arithmetic, cast
from lora_fx.rewrite.columns import picked_out
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rewrite.rule import Match, Miss


class LowerPick:
    """`pick` where a compiler should see what it consists of; before the products that read it."""

    name = "lower"

    def match(self, node: Node) -> Match | Miss:
        """Match it on a device."""
        if node.target is not pick or node.meta[EXAMPLE].device.type == "cpu":
            return Miss("another operator, or one that reads less on a CPU")
        return Match(node)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Pick in the dtype of the product that reads it."""
        (product,) = match.node.users
        x = product.args[1 if product.target is ops.sample_expand else 0]
        wanted = compute_dtype(product.args[-1], dtype(x))  # type: ignore[arg-type]
        return call(graph, picked_on_device, *match.node.args, wanted)


def _choose(graph: Graph, node: Node) -> Node:
    samples, columns, terms = node.args
    own = picked_out(graph, samples, columns, 1)
    sizes = call(graph, torch.abs, own)
    if terms == 1:
        places = call(graph, torch.argmax, sizes, 1, True)
    else:
        top = call(graph, torch.topk, sizes, terms, 1)
        places = call(graph, operator.getitem, top, 1)
    shares = call(graph, torch.gather, own, 1, places)
    return call(graph, torch.where, call(graph, torch.eq, shares, 0), -1, places)


def _sample_scalings(graph: Graph, node: Node) -> Node:
    samples, scalings, columns, branches, which = node.args
    places = call(graph, torch.clamp, which, 0)
    shares = call(graph, torch.gather, picked_out(graph, samples, columns, 1), 1, places)
    own = call(graph, operator.getitem, picked_out(graph, scalings, branches, 0), places)
    factors = call(graph, torch.mul, shares, own)
    return call(graph, torch.where, call(graph, torch.lt, which, 0), 0, factors)


def _take(graph: Graph, node: Node) -> Node:
    stack, which, columns = node.args
    places = call(graph, torch.flatten, call(graph, torch.clamp, which, 0))
    own = call(graph, torch.index_select, stack, 0, places)
    none = call(graph, "view", call(graph, torch.lt, which, 0), -1, 1, 1)
    own = call(graph, "masked_fill", own, none, 0)
    own = call(graph, "view", own, -1, _shape(which)[1], *_shape(stack)[1:])
    if columns:
        return call(graph, torch.flatten, call(graph, "transpose", own, 1, 2), 2)
    return call(graph, torch.flatten, own, 1, 2)


def _sample_shrink(graph: Graph, node: Node) -> Node:
    x, A, dropout, compute = node.args
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    if dropout:
        x = call(graph, F.dropout, x, dropout, True)
    with arithmetic(graph, x, compute):
        return _product(graph, cast(graph, x, wanted), cast(graph, A, wanted))


def _sample_expand(graph: Graph, node: Node) -> Node:
    y, h, B, factors, compute = node.args
    wanted = compute_dtype(compute, dtype(h))  # type: ignore[arg-type]
    with arithmetic(graph, h, compute):
        times = _shape(B)[2] // _shape(factors)[1]
        each = call(graph, torch.repeat_interleave, factors, times, 1)
        is_cast = dtype(B).itemsize > wanted.itemsize
        if is_cast or len(_shape(h)) > 2:
            each = call(graph, "unsqueeze", each, 1)
        if is_cast:
            B = call(graph, torch.mul, B, each)
        else:
            h = call(graph, torch.mul, h, each)
        delta = _product(graph, cast(graph, h, wanted), cast(graph, B, wanted))
    return call(graph, torch.add, y, cast(graph, delta, dtype(y)))


def _spread(graph: Graph, node: Node) -> Node:
    values, columns, ranks = node.args
    parts, kept = [], [-1] * len(_shape(values))
    for first, count, rank in runs(columns, ranks):  # type: ignore[arg-type]
        part = call(graph, torch.narrow, values, -1, first, count)
        wide = call(graph, "expand", call(graph, "unsqueeze", part, -1), *kept, rank)
        parts.append(call(graph, torch.flatten, wide, -2))
    return call(graph, torch.cat, parts, -1) if len(parts) > 1 else parts[0]


def _masked_expand(graph: Graph, node: Node) -> Node:
    y, h, B, scalings, shares, compute = node.args
    wanted = compute_dtype(compute, dtype(h))  # type: ignore[arg-type]
    with arithmetic(graph, h, compute):
        for _ in range(len(_shape(h)) - 2):
            shares = call(graph, "unsqueeze", shares, 1)  # type: ignore[arg-type]
        if dtype(B).itemsize > wanted.itemsize:
            B = call(graph, torch.mul, B, scalings)
        else:
            h = call(graph, torch.mul, h, scalings)
        h = call(graph, torch.mul, h, shares)
        delta = call(graph, F.linear, cast(graph, h, wanted), cast(graph, B, wanted))
    return call(graph, torch.add, y, cast(graph, delta, dtype(y)))


def _product(graph: Graph, x: object, factors: object) -> Node:
    turned = call(graph, "transpose", factors, 1, 2)  # type: ignore[arg-type]
    if len(_shape(x)) == 2:
        product = call(graph, torch.bmm, call(graph, "unsqueeze", x, 1), turned)
        return call(graph, "squeeze", product, 1)
    return call(graph, torch.bmm, x, turned)


def _shape(node: object) -> torch.Size:
    return node.meta[EXAMPLE].shape  # type: ignore[attr-defined]


LOWERED = (
    (ops.choose, _choose),
    (ops.sample_scalings, _sample_scalings),
    (ops.take, _take),
    (ops.sample_shrink, _sample_shrink),
    (ops.sample_expand, _sample_expand),
    (ops.spread, _spread),
    (ops.masked_expand, _masked_expand),
)
