"""Turn LoRA nodes into torch operators; no node of `lora_fx::` is left but custom operators.

    shrink(x, A, p, compute)          →  linear(dropout(x, p).to(d), A.to(d))
    compressed_shrink(x, A, v, …)     →  as in `graph/ops.py`
    convolve(x, A, p, compute, w)     →  conv2d(pad(dropout(x, p).to(d)), A.to(d), …), as w says
    lookup(ids, A, padding, compute)  →  embedding(ids, Aᵀ, padding).to(d)
    expand(y, h, B, scalings, i, c)   →  y + linear((h * scalings[i]).to(d), B.to(d)).to(y.dtype)
        or, if B is cast to fewer bits  →  y + linear(h.to(d), (B * scalings[i]).to(d)).to(y.dtype)
        where h and B have places (*, r, …), conv2d stands for the second linear
        of a share c (S, 1, …)          →  the same with h * c; if b is added, with the product * c
    share(samples, column, rest, n)   →  select(samples, 1, column), or 1 less it, as (S, 1, …)
    invoked(invoked, column, x)       →  arange(T, 0, -1) <= select(invoked, 1, column): (S, T, 1)
    arrow(x, prototypes, top, τ)      →  `graph/arrow.py`
    stack_shrink(x, A, offsets, c)    →  matmul(x.to(d), A.to(d)ᵀ), or as `graph/grouped.py` says
    stack_expand(y, h, B, …)          →  as expand, likewise
    choose, sample_…                  →  as `passes/lower_samples.py` says
    block_diagonal(weight, n)         →  block_diag(*chunk(weight, n))
    diagonal(B, d)                    →  B * d
    perturb(A, std, prior, noise)     →  `graph/monteclora.py`
    magnitude(y, u, m, norms, b)      →  (y + (m / norms - 1) * (u - b)).to(y.dtype)
        on a GPU                      →  with gain(m, norms) for the factor: `kernels/gain.py`
    replace_rows, replace_columns     →  as in `graph/ops.py`
    mix, shift, mix_rows, mix_columns →  `graph/own_tensors.py`
    delta(W, A, B, scaling, t)        →  addmm(W, B.to(d) * scaling, A.to(d)), d that of W

d is the activations' dtype, or the named compute dtype, which then holds under autocast too.
"""

import operator
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.graph.arrow import arrow_shares
from lora_fx.graph.autocast import without_autocast
from lora_fx.graph.convolution import Window
from lora_fx.graph.grouped import grouped, is_fast, missing
from lora_fx.graph.monteclora import perturbed
from lora_fx.graph.own_tensors import mixed, mixed_columns, mixed_rows, shifted
from lora_fx.graph.structure import compute_dtype
from lora_fx.kernels.gain import gain
from lora_fx.passes import lower_samples
from lora_fx.passes.casts import arithmetic, cast
from lora_fx.rewrite.convolved import convolved, pointwise_mapped
from lora_fx.rewrite.driver import apply
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, fake_mode
from lora_fx.rewrite.rule import Match, Miss


def lower(module: GraphModule) -> int:
    """Replace every LoRA node; return how many there were."""
    rules = [Lower(target, build) for target, build in _LOWERED]
    return sum(apply([lower_samples.LowerPick(), *rules], module).values())


class Lower:
    """One LoRA operator → the torch operators it stands for."""

    name = "lower"

    def __init__(self, target: object, build: Callable[[Graph, Node], Node]) -> None:
        self._target = target
        self._build = build

    def match(self, node: Node) -> Match | Miss:
        """Match the operator."""
        return Match(node) if node.target is self._target else Miss("another operator")

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build the torch operators."""
        return self._build(graph, match.node)


def _shrink(graph: Graph, node: Node) -> Node:
    x, A, dropout, compute = node.args
    if dropout:
        x = call(graph, F.dropout, x, dropout, True)
    return _linear(graph, x, A, compute)


def _compressed_shrink(graph: Graph, node: Node) -> Node:
    x, A, v, groups, scale, dropout, compute = node.args
    if dropout:
        x = call(graph, F.dropout, x, dropout, True)
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    columns = A.meta[EXAMPLE].shape[1]  # type: ignore[union-attr]
    with arithmetic(graph, x, compute):
        x, A, v = (cast(graph, one, wanted) for one in (x, A, v))
        rows = [call(graph, "unsqueeze", v, 0)] * groups  # type: ignore[operator]
        P = call(graph, torch.narrow, call(graph, torch.block_diag, *rows), 1, 0, columns)
        kept = call(graph, F.linear, call(graph, "detach", x), P)
        own = call(graph, F.linear, kept, call(graph, F.linear, A, P))
        own = call(graph, torch.mul, own, scale)
        nothing = call(graph, torch.sub, own, call(graph, "detach", own))
        h = call(graph, F.linear, x, call(graph, "detach", A))
        return call(graph, torch.add, h, nothing)


def _convolve(graph: Graph, node: Node) -> Node:
    x, A, dropout, compute, window = node.args
    if dropout:
        x = call(graph, F.dropout, x, dropout, True)
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    with arithmetic(graph, x, compute):
        x, A = cast(graph, x, wanted), cast(graph, A, wanted)
        return convolved(graph, x, A, Window.parse(window))  # type: ignore[arg-type]


def _lookup(graph: Graph, node: Node) -> Node:
    ids, A, padding, compute = node.args
    h = call(graph, F.embedding, ids, call(graph, "t", A), padding)
    return cast(graph, h, compute_dtype(compute, dtype(h)))  # type: ignore[arg-type, return-value]


def _expand(graph: Graph, node: Node) -> Node:
    y, h, B, scalings, branch, compute, *more = node.args
    bias, share = (*more, None, None)[:2]
    wanted = compute_dtype(compute, dtype(h))  # type: ignore[arg-type]
    scaling = call(graph, operator.getitem, scalings, branch)
    with arithmetic(graph, h, compute):
        biases = []
        if bias is not None:
            biases = [cast(graph, call(graph, torch.mul, bias, scaling), wanted)]
        if dtype(B).itemsize > wanted.itemsize:  # the cast rounds B, scaled or not
            B = call(graph, torch.mul, B, scaling)
        else:
            h = call(graph, torch.mul, h, scaling)
        if share is not None and not biases:
            h = call(graph, torch.mul, h, share)
        h, B = cast(graph, h, wanted), cast(graph, B, wanted)
        delta = pointwise_mapped(graph, h, B, *biases)  # type: ignore[arg-type]
        if share is not None and biases:
            delta = call(graph, torch.mul, delta, share)
    return call(graph, torch.add, y, cast(graph, delta, dtype(y)))


def _stack_shrink(graph: Graph, node: Node) -> Node:
    x, A, offsets, compute = node.args
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    with arithmetic(graph, x, compute):
        x, A = cast(graph, x, wanted), cast(graph, A, wanted)
        if offsets is not None and is_fast(x.meta[EXAMPLE]):  # type: ignore[attr-defined]
            columns = missing(A.meta[EXAMPLE].shape[1])  # type: ignore[attr-defined]
            A = call(graph, F.pad, A, (0, 0, 0, columns)) if columns else A
            A = call(graph, "contiguous", A)
        return _stack_product(graph, x, A, offsets)


def _stack_expand(graph: Graph, node: Node) -> Node:
    y, h, B, scalings, branch, compute, offsets, *share = node.args
    wanted = compute_dtype(compute, dtype(h))  # type: ignore[arg-type]
    scaling = call(graph, operator.getitem, scalings, branch)
    with arithmetic(graph, h, compute):
        if dtype(B).itemsize > wanted.itemsize:  # the cast rounds B, scaled or not
            B = call(graph, torch.mul, B, scaling)
        else:
            h = call(graph, torch.mul, h, scaling)
        h = call(graph, torch.mul, h, *share) if share else h
        h, B = cast(graph, h, wanted), cast(graph, B, wanted)
        if offsets is not None:
            columns = h.meta[EXAMPLE].shape[1] - B.meta[EXAMPLE].shape[2]  # type: ignore[attr-defined]
            B = call(graph, F.pad, B, (0, columns)) if columns else B
            B = call(graph, "contiguous", B)
        delta = _stack_product(graph, h, B, offsets)
    return call(graph, torch.add, y, cast(graph, delta, dtype(y)))


def _stack_product(graph: Graph, x: object, factor: object, offsets: object) -> Node:
    turned = call(graph, "transpose", factor, -2, -1)  # type: ignore[arg-type]
    if offsets is None:
        return call(graph, torch.matmul, x, turned)
    return call(graph, grouped, x, turned, offsets)


def _share(graph: Graph, node: Node) -> Node:
    samples, column, rest, dims = node.args
    share = call(graph, torch.select, samples, 1, column)
    share = call(graph, torch.rsub, share, 1) if rest else share
    return call(graph, "reshape", share, -1, *[1] * (dims - 1))  # type: ignore[operator]


def _invoked(graph: Graph, node: Node) -> Node:
    invoked, column, x = node.args
    example = x.meta[EXAMPLE]  # type: ignore[union-attr]
    tokens = call(graph, "size", x, 1)
    with fake_mode((example,)):
        to_the_end = call(graph, torch.arange, tokens, 0, -1, device=example.device)
    counts = call(graph, "unsqueeze", call(graph, torch.select, invoked, 1, column), 1)
    acts = call(graph, "unsqueeze", call(graph, torch.le, to_the_end, counts), -1)
    return call(graph, "to", acts, torch.float32)


def _arrow(graph: Graph, node: Node) -> Node:
    x, prototypes, top, temperature = node.args
    wanted = torch.promote_types(dtype(x), dtype(prototypes))
    with without_autocast(graph, x.meta[EXAMPLE].device.type):  # type: ignore[union-attr]
        x, prototypes = cast(graph, x, wanted), cast(graph, prototypes, wanted)
        return arrow_shares(x, prototypes, top, temperature, partial(call, graph))  # type: ignore[arg-type]


def _block_diagonal(graph: Graph, node: Node) -> Node:
    weight, blocks = node.args
    chunks = call(graph, torch.chunk, weight, blocks)
    parts = (call(graph, operator.getitem, chunks, i) for i in range(blocks))  # type: ignore[arg-type]
    return call(graph, torch.block_diag, *parts)


def _diagonal(graph: Graph, node: Node) -> Node:
    return call(graph, torch.mul, *node.args)


def _perturb(graph: Graph, node: Node) -> Node:
    A, std, prior, noise = node.args
    sizes = (len(prior.meta[EXAMPLE]), *A.meta[EXAMPLE].shape)  # type: ignore[union-attr]
    return perturbed(A, std, prior, noise, sizes, partial(call, graph))  # type: ignore[arg-type]


def _magnitude(graph: Graph, node: Node) -> Node:
    y, u, m, norms, *more = node.args
    bias, share = (*more, None, None)[:2]
    own = u if bias is None else call(graph, torch.sub, u, bias)
    if kernels.are_on(y.meta[EXAMPLE].device.type):  # type: ignore[union-attr]
        factor = call(graph, gain, m, norms)
    else:
        factor = call(graph, torch.sub, call(graph, torch.div, m, norms), 1)
    gained = call(graph, torch.mul, factor, own)
    gained = gained if share is None else call(graph, torch.mul, share, gained)
    total = call(graph, torch.add, y, gained)
    return cast(graph, total, dtype(y))  # type: ignore[return-value]


def _replace_rows(graph: Graph, node: Node) -> Node:
    y, ids, tokens, rows, padding = node.args
    hits = call(graph, torch.eq, call(graph, "unsqueeze", ids, -1), tokens)
    which = call(graph, "argmax", call(graph, "to", hits, torch.int32), -1)
    own = cast(graph, call(graph, F.embedding, which, rows, padding), dtype(y))
    return call(graph, torch.where, call(graph, torch.any, hits, -1, True), own, y)


def _replace_columns(graph: Graph, node: Node) -> Node:
    y, x, tokens, rows, bias = node.args
    own = () if bias is None else (call(graph, operator.getitem, bias, tokens),)
    delta = call(graph, F.linear, x, cast(graph, rows, dtype(x)), *own)
    return call(graph, "index_copy", y, -1, tokens, cast(graph, delta, dtype(y)))


def _mix(graph: Graph, node: Node) -> Node:
    y, own, samples, columns, *base = node.args
    return mixed(y, own, samples, columns, base[0] if base else None, partial(call, graph))  # type: ignore[arg-type]


def _shift(graph: Graph, node: Node) -> Node:
    return shifted(*node.args, do=partial(call, graph))  # type: ignore[arg-type]


def _mix_rows(graph: Graph, node: Node) -> Node:
    return mixed_rows(*node.args, do=partial(call, graph))  # type: ignore[arg-type]


def _mix_columns(graph: Graph, node: Node) -> Node:
    return mixed_columns(*node.args, do=partial(call, graph))  # type: ignore[arg-type]


def _delta(graph: Graph, node: Node) -> Node:
    weight, A, B, scaling, transposed = node.args
    A, B = cast(graph, A, dtype(weight)), cast(graph, B, dtype(weight))
    if scaling is not None:
        B = call(graph, torch.mul, B, scaling)
    factors = (call(graph, "t", A), call(graph, "t", B)) if transposed else (B, A)
    return call(graph, torch.addmm, weight, *factors)


_LOWERED = (
    (ops.shrink, _shrink),
    (ops.compressed_shrink, _compressed_shrink),
    (ops.convolve, _convolve),
    (ops.lookup, _lookup),
    (ops.expand, _expand),
    (ops.share, _share),
    *lower_samples.LOWERED,
    (ops.invoked, _invoked),
    (ops.arrow, _arrow),
    (ops.stack_shrink, _stack_shrink),
    (ops.stack_expand, _stack_expand),
    (ops.block_diagonal, _block_diagonal),
    (ops.diagonal, _diagonal),
    (ops.perturb, _perturb),
    (ops.magnitude, _magnitude),
    (ops.replace_rows, _replace_rows),
    (ops.replace_columns, _replace_columns),
    (ops.mix, _mix),
    (ops.shift, _shift),
    (ops.mix_rows, _mix_rows),
    (ops.mix_columns, _mix_columns),
    (ops.delta, _delta),
)


def _linear(graph: Graph, x: object, weight: object, compute: object, *bias: object) -> Node:
    wanted = compute_dtype(compute, dtype(x))  # type: ignore[arg-type]
    with arithmetic(graph, x, compute):
        return call(graph, F.linear, cast(graph, x, wanted), cast(graph, weight, wanted), *bias)
