"""Turn what samples compute with their own factors into torch operators; `pick` stays.

    choose(samples, columns, k)       →  where(gather(c, p) == 0, -1, p), where c are the columns of
                                         samples and p is topk(abs(c), k), or argmax
    sample_scalings(…, which)         →  where(which < 0, 0, gather(c, p) * scalings[p])
    sample_shrink(x, A, p, compute)   →  bmm(dropout(x, p).to(d), A.to(d)ᵀ)
    sample_expand(y, h, B, f, c)      →  y + bmm((h * f).to(d), B.to(d)ᵀ).to(y.dtype)
        or, if B is cast to fewer bits  →  y + bmm(h.to(d), (B * f).to(d)ᵀ).to(y.dtype)

`graph/sample_references.py` says what they compute.
"""

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import compute_dtype
from lora_fx.passes.casts import arithmetic, cast
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype


def _choose(graph: Graph, node: Node) -> Node:
    samples, columns, terms = node.args
    own = _picked_out(graph, samples, columns, 1)
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
    shares = call(graph, torch.gather, _picked_out(graph, samples, columns, 1), 1, places)
    own = call(graph, operator.getitem, _picked_out(graph, scalings, branches, 0), places)
    factors = call(graph, torch.mul, shares, own)
    return call(graph, torch.where, call(graph, torch.lt, which, 0), 0, factors)


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
        wide = call(graph, "unsqueeze", each, 1)
        if dtype(B).itemsize > wanted.itemsize:
            B = call(graph, torch.mul, B, wide)
        else:
            h = call(graph, torch.mul, h, each if len(_shape(h)) == 2 else wide)
        delta = _product(graph, cast(graph, h, wanted), cast(graph, B, wanted))
    return call(graph, torch.add, y, cast(graph, delta, dtype(y)))


def _picked_out(graph: Graph, values: object, columns: object, dim: int) -> object:
    assert isinstance(columns, Sequence)
    if list(columns) == list(range(_shape(values)[dim])):
        return values
    parts = [call(graph, torch.select, values, dim, column) for column in columns]
    return call(graph, torch.stack, parts, dim)


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
    (ops.sample_shrink, _sample_shrink),
    (ops.sample_expand, _sample_expand),
)
