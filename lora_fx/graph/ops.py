"""The `lora_fx::` operators and their reference implementations.

    site(y, x, params, scalings, structure)            y + sum_i s_i * (B_i A_i drop_i(x) + b_i)
    shrink(x, A, dropout, compute)                     drop(x) Aᵀ
    lookup(ids, A, padding, compute)                   columns of A, one for each id
    expand(y, h, B, scalings, branch, compute, bias)   y + (s h) Bᵀ + s b
    replace_rows(y, ids, tokens, rows, padding)        y, and rows[i] where the id is tokens[i]
    replace_columns(y, x, tokens, rows, bias)          y, and x rows[i]ᵀ + bias in column tokens[i]
    merge(W, params, scalings, structure)              W + sum_i s_i B_i A_i
    delta(W, A, B, scaling, transposed)                W + s B A

x: (*, in)   A: (r, in)   B: (out, r)   y: (*, out)   h: (*, r)   scalings: float32 (branches,)
b: (out,)   ids: (*)   tokens: (n,)   rows: (n, in or out)   W: (out, in), or (in, out) and B A
transposed
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3. Of an embedding, x is one-hot and `in` its rows.

All are CompositeImplicitAutograd: one node in a captured graph, decomposed by autograd and
`torch.compile`, so no derivative or shape formula has to be kept in step. They are the plain
differentiable path that every rewrite is compared with.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph.structure import ACTIVATION, Structure, compute_dtype

_library = torch.library.Library("lora_fx", "DEF")
_library.define(
    "site(Tensor y, Tensor x, Tensor[] params, Tensor scalings, str structure) -> Tensor"
)
_library.define("shrink(Tensor x, Tensor A, float dropout, str compute) -> Tensor")
_library.define("lookup(Tensor ids, Tensor A, int? padding, str compute) -> Tensor")
_library.define(
    "expand(Tensor y, Tensor h, Tensor B, Tensor scalings, int branch, str compute, "
    "Tensor? bias=None) -> Tensor"
)
_library.define(
    "replace_rows(Tensor y, Tensor ids, Tensor tokens, Tensor rows, int? padding) -> Tensor"
)
_library.define(
    "replace_columns(Tensor y, Tensor x, Tensor tokens, Tensor rows, Tensor? bias) -> Tensor"
)

_library.define("merge(Tensor W, Tensor[] params, Tensor scalings, str structure) -> Tensor")
_library.define("delta(Tensor W, Tensor A, Tensor B, Tensor? scaling, bool transposed) -> Tensor")


def shrink_reference(x: Tensor, A: Tensor, dropout: float, compute: str) -> Tensor:
    """Project the input to the rank space: `drop(x) Aᵀ`, x (*, in), A (r, in) -> (*, r)."""
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with _arithmetic(x, compute):
        return F.linear(x.to(dtype), A.to(dtype))


def lookup_reference(ids: Tensor, A: Tensor, padding: int | None, compute: str) -> Tensor:
    """Pick the column of A (r, in) of each id: ids (*) -> (*, r); column `padding` learns nothing.

    In the dtype of A, or the one that `compute` names.
    """
    h = F.embedding(ids, A.t(), padding)
    return h.to(compute_dtype(compute, h.dtype))


def expand_reference(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    scalings: Tensor,
    branch: int,
    compute: str,
    bias: Tensor | None = None,
) -> Tensor:
    """Add one branch to the base output: `y + (s h) Bᵀ + s b`, h (*, r), B (out, r) -> (*, out)."""
    dtype = compute_dtype(compute, h.dtype)
    with _arithmetic(h, compute):
        scaled = None if bias is None else (bias * scalings[branch]).to(dtype)
        delta = F.linear((h * scalings[branch]).to(dtype), B.to(dtype), scaled)
    return y + delta.to(y.dtype)


def site_reference(
    y: Tensor, x: Tensor, params: list[Tensor], scalings: Tensor, structure: str
) -> Tensor:
    """Add every branch of a site to its base output `y`; `params` is A₀, B₀, A₁, B₁, …."""
    parsed = Structure.parse(structure)
    for i, (A, B, bias) in enumerate(parsed.params(params)):
        branch = parsed.branches[i]
        if parsed.kind == "embedding":
            h = lookup_reference(x, A, parsed.padding, branch.compute)
        else:
            h = shrink_reference(x, A, branch.dropout, branch.compute)
        y = expand_reference(y, h, B, scalings, i, branch.compute, bias)
    return y


def replace_rows_reference(
    y: Tensor, ids: Tensor, tokens: Tensor, rows: Tensor, padding: int | None
) -> Tensor:
    """Put a row of its own in the place of each listed token: y (*, out), ids (*) -> (*, out).

    Row `padding` learns nothing.
    """
    hits = ids.unsqueeze(-1) == tokens
    own = F.embedding(hits.to(torch.int32).argmax(-1), rows, padding).to(y.dtype)
    return torch.where(hits.any(-1, keepdim=True), own, y)


def replace_columns_reference(
    y: Tensor, x: Tensor, tokens: Tensor, rows: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute the listed outputs from rows of their own: y (*, out), x (*, in) -> (*, out)."""
    own = F.linear(x, rows.to(x.dtype), None if bias is None else bias[tokens])
    return y.index_copy(-1, tokens, own.to(y.dtype))


def delta_reference(
    W: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None, transposed: bool
) -> Tensor:
    """Add a low-rank product to a weight, in the weight's dtype: `W + s B A`, or `W + s Aᵀ Bᵀ`."""
    A, B = A.to(W.dtype), B.to(W.dtype)
    if scaling is not None:
        B = B * scaling
    return torch.addmm(W, A.t(), B.t()) if transposed else torch.addmm(W, B, A)


def merge_reference(W: Tensor, params: list[Tensor], scalings: Tensor, structure: str) -> Tensor:
    """Add every branch to a weight in the dtype of the scalings, and round once, to its own."""
    parsed = Structure.parse(structure)
    merged = W.to(scalings.dtype)
    for i, (A, B, _) in enumerate(parsed.params(params)):
        merged = delta_reference(merged, A, B, scalings[i], parsed.transposed)
    return merged.to(W.dtype)


def _arithmetic(x: Tensor, compute: str):
    """Keep a named compute dtype under autocast; `activation` leaves autocast in charge."""
    if compute == ACTIVATION:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


for _name, _reference in {
    "site": site_reference,
    "shrink": shrink_reference,
    "lookup": lookup_reference,
    "expand": expand_reference,
    "replace_rows": replace_rows_reference,
    "replace_columns": replace_columns_reference,
    "merge": merge_reference,
    "delta": delta_reference,
}.items():
    _library.impl(_name, _reference, "CompositeImplicitAutograd")

site = torch.ops.lora_fx.site.default
shrink = torch.ops.lora_fx.shrink.default
lookup = torch.ops.lora_fx.lookup.default
expand = torch.ops.lora_fx.expand.default
replace_rows = torch.ops.lora_fx.replace_rows.default
replace_columns = torch.ops.lora_fx.replace_columns.default
merge = torch.ops.lora_fx.merge.default
delta = torch.ops.lora_fx.delta.default
