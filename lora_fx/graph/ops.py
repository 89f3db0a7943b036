"""The `lora_fx::` operators and their reference implementations.

    site(y, x, params, scalings, structure, base, samples)
                                                       y + sum_i s_i * (B_i A_i drop_i(x) + b_i)
    share(samples, column, rest, dims)                 of each sample, to multiply (S, …)
    shrink(x, A, dropout, compute)                     drop(x) Aᵀ
    compressed_shrink(x, A, v, groups, scale, dropout, compute)    shrink; dA is VeLoRA's
    convolve(x, A, dropout, compute, window)           drop(x) * A, as the layer convolves
    lookup(ids, A, padding, compute)                   columns of A, one for each id
    expand(y, h, B, scalings, branch, compute, bias, share)        y + c ((s h) Bᵀ + s b)
    block_diagonal(weight, blocks)                     the rows' chunks on a diagonal
    diagonal(B, d)                                     B diag(d)
    perturb(A, std, prior, noise)                      drawn around A: `graph/monteclora.py`
    norms(W, A, B, scalings, branch, factor)           of the rows of W + s B A, no gradient
    magnitude(y, u, m, norms, bias, share)             y + c (m / norms - 1) * (u - bias)
    replace_rows(y, ids, tokens, rows, padding)        y, and rows[i] where the id is tokens[i]
    replace_columns(y, x, tokens, rows, bias)          y, and x rows[i]ᵀ + bias in column tokens[i]
    merge(W, params, scalings, structure)              W + sum_i s_i B_i A_i
    delta(W, A, B, scaling, transposed)                W + s B A

x: (*, in)   A: (r, in)   B: (out, r)   y: (*, out)   h: (*, r)   scalings: float32 (branches,)
b: (out,)   d: (r,)   ids: (*)   tokens: (n,)   rows: (n, in or out)   W: (out, in)
m, norms: (out,)
In a mixed batch `samples` (S, adapters), float32, are the shares that adapters have in each sample:
dimension 0 of x and y is then S, and a branch's share c in a sample multiplies all it adds there.
Without them c is 1.
Where `merge` and `delta` are given W as (in, out), B A is transposed. Of a convolution, all have
places behind their features: x (*, in, …), A (r, in, k…), B (out, r / groups, 1…), y (*, out, …).
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3. Of an embedding, x is one-hot and `in` its rows.
With a magnitude m, DoRA's branch is what makes W x to (m / ‖W + s B A‖) (W + s B A) x: Liu et al.
2024, arXiv 2402.09353, eq. 5. Several branches add up what each alone adds to W x. `base` is W and
the base's bias, if there is one, where a branch needs them.

All are CompositeImplicitAutograd: one node in a captured graph, decomposed by autograd and
`torch.compile`, so no derivative or shape formula has to be kept in step. They are the plain
differentiable path that every rewrite is compared with.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.autocast import autocast_off
from lora_fx.graph.convolution import Window, by_channel, convolution, pointwise
from lora_fx.graph.monteclora import perturbed, run
from lora_fx.graph.row_norms import row_norms
from lora_fx.graph.structure import ACTIVATION, Structure, compute_dtype
from lora_fx.graph.velora import projection

_library = torch.library.Library("lora_fx", "DEF")
_library.define(
    "site(Tensor y, Tensor x, Tensor[] params, Tensor scalings, str structure, "
    "Tensor[] base, Tensor? samples=None) -> Tensor"
)
_library.define("share(Tensor samples, int column, bool rest, int dims) -> Tensor")
_library.define("shrink(Tensor x, Tensor A, float dropout, str compute) -> Tensor")
_library.define(
    "compressed_shrink(Tensor x, Tensor A, Tensor v, int groups, float scale, float dropout, "
    "str compute) -> Tensor"
)
_library.define("convolve(Tensor x, Tensor A, float dropout, str compute, str window) -> Tensor")
_library.define("lookup(Tensor ids, Tensor A, int? padding, str compute) -> Tensor")
_library.define(
    "expand(Tensor y, Tensor h, Tensor B, Tensor scalings, int branch, str compute, "
    "Tensor? bias=None, Tensor? share=None) -> Tensor"
)
_library.define("block_diagonal(Tensor weight, int blocks) -> Tensor")
_library.define("diagonal(Tensor B, Tensor d) -> Tensor")
_library.define("perturb(Tensor A, Tensor std, Tensor prior, float noise) -> Tensor")
_library.define(
    "norms(Tensor W, Tensor A, Tensor B, Tensor scalings, int branch, float factor) -> Tensor"
)
_library.define(
    "magnitude(Tensor y, Tensor u, Tensor m, Tensor norms, Tensor? bias=None, "
    "Tensor? share=None) -> Tensor"
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


def compressed_shrink_reference(
    x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float, dropout: float, compute: str
) -> Tensor:
    """Project as `shrink` does; A's gradient is of what the direction v (width,) leaves of x.

    Of x nothing is kept but its projection (*, groups): `graph/velora.py`.
    """
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with _arithmetic(x, compute):
        x, A = x.to(dtype), A.to(dtype)
        P = projection(v.to(dtype), groups, x.shape[-1])
        own = F.linear(F.linear(x.detach(), P), F.linear(A, P)) * scale
        return F.linear(x, A.detach()) + (own - own.detach())


def convolve_reference(x: Tensor, A: Tensor, dropout: float, compute: str, window: str) -> Tensor:
    """Project the input at every place: x (*, in, …), A (r, in, k…) -> (*, r, …)."""
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with _arithmetic(x, compute):
        return convolution(x.to(dtype), A.to(dtype), Window.parse(window))


def lookup_reference(ids: Tensor, A: Tensor, padding: int | None, compute: str) -> Tensor:
    """Pick the column of A (r, in) of each id: ids (*) -> (*, r); column `padding` learns nothing.

    In the dtype of A, or the one that `compute` names.
    """
    h = F.embedding(ids, A.t(), padding)
    return h.to(compute_dtype(compute, h.dtype))


def share_reference(samples: Tensor, column: int, rest: bool, dims: int) -> Tensor:
    """Return one column of the samples' shares (S, adapters), or the rest to 1: (S, 1, …)."""
    share = samples.select(1, column)
    share = 1 - share if rest else share
    return share.reshape(-1, *[1] * (dims - 1))


def expand_reference(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    scalings: Tensor,
    branch: int,
    compute: str,
    bias: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Add one branch to the base output: `y + c ((s h) Bᵀ + s b)`, h (*, r), B (out, r).

    -> (*, out). The share c (S, 1, …) is 1 if there is none. Of a convolution h (*, r, …),
    B (out, r / groups, 1…) -> (*, out, …).
    """
    dtype = compute_dtype(compute, h.dtype)
    with _arithmetic(h, compute):
        scaled = None if bias is None else (bias * scalings[branch]).to(dtype)
        if B.dtype.itemsize > dtype.itemsize:  # the cast rounds B, scaled or not
            B = B * scalings[branch]
        else:
            h = h * scalings[branch]
        if share is not None and scaled is None:
            h = h * share
        delta = pointwise(h.to(dtype), B.to(dtype), scaled)
        if share is not None and scaled is not None:
            delta = delta * share
    return y + delta.to(y.dtype)


def block_diagonal_reference(weight: Tensor, blocks: int) -> Tensor:
    """Put the chunks of the rows on a diagonal: (m, n) -> (m, blocks * n)."""
    return torch.block_diag(*weight.chunk(blocks))


def diagonal_reference(B: Tensor, d: Tensor) -> Tensor:
    """Return B diag(d), B (out, r), d (r,): KaSA's singular values, arXiv 2412.06071, eq. 7."""
    return B * d


def perturb_reference(A: Tensor, std: Tensor, prior: Tensor, noise: float) -> Tensor:
    """Return MonteCLoRA's A (r, in) of one step, drawn with the priors std (r,) and prior (n,)."""
    sizes = len(prior), A.shape[0], A.shape[1]
    return perturbed(A, std, prior, noise, sizes, run)


def norms_reference(
    W: Tensor, A: Tensor, B: Tensor, scalings: Tensor, branch: int, factor: float
) -> Tensor:
    """Return the norms of the rows of `W + s B A`; `scalings` are `factor` times s."""
    return row_norms(W, A, B, scalings[branch] / factor)


def magnitude_reference(
    y: Tensor,
    u: Tensor,
    m: Tensor,
    norms: Tensor,
    bias: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Give `u` (*, out), of which `y` has c in it, the magnitude m.

    `y + c (m / norms - 1) * (u - bias)`; the share c (S, 1, …) is 1 if there is none.
    Computed in the dtype of m and norms, if that is wider, and rounded once.
    """
    own = u if bias is None else u - bias
    gained = (m / norms - 1) * own
    return (y + (gained if share is None else share * gained)).to(y.dtype)


def site_reference(
    y: Tensor,
    x: Tensor,
    params: list[Tensor],
    scalings: Tensor,
    structure: str,
    base: Sequence[Tensor],
    samples: Tensor | None = None,
) -> Tensor:
    """Add every branch of a site to its base output `y`; `params` is A₀, B₀, A₁, B₁, ….

    Raises LoraFxError if dimension 0 of the input cannot be that of the samples.
    """
    if samples is not None and x.shape[0] != samples.shape[0]:
        raise _rows_not_samples(x.shape[0], samples.shape[0])
    parsed = Structure.parse(structure)
    of_base, window = y, parsed.window
    places = 0 if window is None else window.dimensions
    for i, (A, B, bias, m, v, d, priors) in enumerate(parsed.params(params)):
        branch = parsed.branches[i]
        A, B = (
            block_diagonal_reference(factor, blocks) if blocks > 1 else factor
            for factor, blocks in zip((A, B), branch.blocks, strict=True)
        )
        B = B if d is None else diagonal_reference(B, d)
        A = A if priors is None else perturb_reference(A, priors[0], priors[1], branch.noise)
        dropped = F.dropout(x, branch.dropout, training=True) if branch.dropout else x
        if parsed.kind == "embedding":
            h = lookup_reference(x, A, parsed.padding, branch.compute)
        elif v is not None:
            compression = v, branch.groups, branch.scale, 0.0, branch.compute
            h = compressed_shrink_reference(dropped, A, *compression)
        elif window is not None:
            h = convolve_reference(dropped, A, 0.0, branch.compute, str(window))
        else:
            h = shrink_reference(dropped, A, 0.0, branch.compute)
        share = None
        if samples is not None and branch.column is not None:
            share = share_reference(samples, branch.column, branch.rest, h.ndim)
        alone = y is of_base and not branch.dropout and share is None
        y = expand_reference(y, h, B, scalings, i, branch.compute, bias, share)
        if m is not None:
            W, *of_layer = (base[0],) if branch.dropout else base
            own = of_base
            if branch.dropout:
                own = convolution(dropped, W, window) if window else F.linear(dropped, W)
            u = y if alone else expand_reference(own, h, B, scalings, i, branch.compute)
            W, A, B = (tensor.flatten(1) for tensor in (W, A, B))
            norms = norms_reference(W, A, B, scalings, i, parsed.factor)
            m, norms, *of_layer = (by_channel(t, places) for t in (m, norms, *of_layer))
            y = magnitude_reference(y, u, m, norms, of_layer[0] if of_layer else None, share)
    return y


def _rows_not_samples(rows: int, samples: int) -> LoraFxError:
    message = "a mixed batch reaches an adapted module in rows that are not its samples"
    note = f"dimension 0 of its input has {rows} rows, and there are {samples} samples"
    help = "adapt other modules, or call the model with one adapter at a time: `set_adapter`"
    return LoraFxError((Diagnostic("rows-not-samples", message, notes=(note,), help=help),))


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
    for i, (A, B, *_) in enumerate(parsed.params(params)):
        merged = delta_reference(merged, A, B, scalings[i], parsed.transposed)
    return merged.to(W.dtype)


def _arithmetic(x: Tensor, compute: str):
    """Keep a named compute dtype under autocast; `activation` leaves autocast in charge."""
    if compute == ACTIVATION:
        return nullcontext()
    return autocast_off(x.device.type)


for _name, _reference in {
    "site": site_reference,
    "shrink": shrink_reference,
    "compressed_shrink": compressed_shrink_reference,
    "convolve": convolve_reference,
    "lookup": lookup_reference,
    "share": share_reference,
    "expand": expand_reference,
    "block_diagonal": block_diagonal_reference,
    "diagonal": diagonal_reference,
    "perturb": perturb_reference,
    "norms": norms_reference,
    "magnitude": magnitude_reference,
    "replace_rows": replace_rows_reference,
    "replace_columns": replace_columns_reference,
    "merge": merge_reference,
    "delta": delta_reference,
}.items():
    _library.impl(_name, _reference, "CompositeImplicitAutograd")

site = torch.ops.lora_fx.site.default
shrink = torch.ops.lora_fx.shrink.default
compressed_shrink = torch.ops.lora_fx.compressed_shrink.default
convolve = torch.ops.lora_fx.convolve.default
lookup = torch.ops.lora_fx.lookup.default
share = torch.ops.lora_fx.share.default
expand = torch.ops.lora_fx.expand.default
block_diagonal = torch.ops.lora_fx.block_diagonal.default
diagonal = torch.ops.lora_fx.diagonal.default
perturb = torch.ops.lora_fx.perturb.default
norms = torch.ops.lora_fx.norms.default
magnitude = torch.ops.lora_fx.magnitude.default
replace_rows = torch.ops.lora_fx.replace_rows.default
replace_columns = torch.ops.lora_fx.replace_columns.default
merge = torch.ops.lora_fx.merge.default
delta = torch.ops.lora_fx.delta.default
