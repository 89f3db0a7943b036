"""What the operators of an adapted graph compute, in torch: see `graph/ops.py`."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph.arrow import arrow_shares
from lora_fx.graph.autocast import autocast_off
from lora_fx.graph.convolution import Window, convolution, pointwise
from lora_fx.graph.grouped import grouped, is_fast, missing
from lora_fx.graph.monteclora import perturbed, run
from lora_fx.graph.row_norms import packed_row_norms, row_norms
from lora_fx.graph.structure import ACTIVATION, compute_dtype
from lora_fx.graph.velora import projection


def shrink(x: Tensor, A: Tensor, dropout: float, compute: str) -> Tensor:
    """Project the input to the rank space: `drop(x) Aᵀ`, x (*, in), A (r, in) -> (*, r)."""
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with arithmetic(x, compute):
        return F.linear(x.to(dtype), A.to(dtype))


def compressed_shrink(
    x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float, dropout: float, compute: str
) -> Tensor:
    """Project as `shrink` does; A's gradient is of what the direction v (width,) leaves of x.

    Of x nothing is kept but its projection (*, groups): `graph/velora.py`.
    """
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with arithmetic(x, compute):
        x, A = x.to(dtype), A.to(dtype)
        P = projection(v.to(dtype), groups, x.shape[-1])
        own = F.linear(F.linear(x.detach(), P), F.linear(A, P)) * scale
        return F.linear(x, A.detach()) + (own - own.detach())


def convolve(x: Tensor, A: Tensor, dropout: float, compute: str, window: str) -> Tensor:
    """Project the input at every place: x (*, in, …), A (r, in, k…) -> (*, r, …)."""
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with arithmetic(x, compute):
        return convolution(x.to(dtype), A.to(dtype), Window.parse(window))


def lookup(ids: Tensor, A: Tensor, padding: int | None, compute: str) -> Tensor:
    """Pick the column of A (r, in) of each id: ids (*) -> (*, r); column `padding` learns nothing.

    In the dtype of A, or the one that `compute` names.
    """
    h = F.embedding(ids, A.t(), padding)
    return h.to(compute_dtype(compute, h.dtype))


def share(samples: Tensor, column: int, rest: bool, dims: int) -> Tensor:
    """Return one column of the samples' shares (S, adapters), or the rest to 1: (S, 1, …)."""
    share = samples.select(1, column)
    share = 1 - share if rest else share
    return share.reshape(-1, *[1] * (dims - 1))


def invoked(invoked: Tensor, column: int, x: Tensor) -> Tensor:
    """Return 1 for the last tokens of each sample, as many as a column says, else 0: (S, T, 1).

    `invoked` (S, adapters), integers that may be below 0 or above T; x (S, T, in).
    """
    to_the_end = torch.arange(x.shape[1], 0, -1, device=x.device)
    acts = to_the_end <= invoked.select(1, column).unsqueeze(1)
    return acts.unsqueeze(-1).to(torch.float32)


def arrow(x: Tensor, prototypes: Tensor, top: int, temperature: float) -> Tensor:
    """Return the shares of n branches in each token: x (*, in), prototypes (n, in) -> (*, n).

    In the wider dtype of both, under autocast too: `graph/arrow.py`.
    """
    dtype = torch.promote_types(x.dtype, prototypes.dtype)
    with autocast_off(x.device.type):
        return arrow_shares(x.to(dtype), prototypes.to(dtype), top, temperature)


def expand(
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

    -> (*, out). The share c (S, 1, …) or (*, 1) is 1 if there is none. Of a
    convolution h (*, r, …), B (out, r / groups, 1…) -> (*, out, …).
    """
    dtype = compute_dtype(compute, h.dtype)
    with arithmetic(h, compute):
        scaled = None if bias is None else (bias * scalings[branch]).to(dtype)
        h, B = _scaled(h, B, scalings[branch], dtype)
        if share is not None and scaled is None:
            h = h * share
        delta = pointwise(h.to(dtype), B.to(dtype), scaled)
        if share is not None and scaled is not None:
            delta = delta * share
    return y + delta.to(y.dtype)


def stack_shrink(x: Tensor, A: Tensor, offsets: Tensor | None, compute: str) -> Tensor:
    """Project as `shrink` does, by the matrices of a stack A (n, r, in): x (n, *, in) -> (n, *, r).

    With `offsets`, x (S, in) -> (S, r), or more columns, of zeros.
    """
    dtype = compute_dtype(compute, x.dtype)
    with arithmetic(x, compute):
        x, A = x.to(dtype), A.to(dtype)
        if offsets is None:
            return torch.matmul(x, A.mT)
        if is_fast(x):
            A = F.pad(A, (0, 0, 0, missing(A.shape[1])))
        return grouped(x, A.contiguous().mT, offsets)


def stack_expand(
    y: Tensor,
    h: Tensor,
    B: Tensor,
    scalings: Tensor,
    branch: int,
    compute: str,
    offsets: Tensor | None,
    share: Tensor | None = None,
) -> Tensor:
    """Add one branch as `expand` does, by the matrices of a stack B (n, out, r).

    The share c of each row is (R, 1, …), dimension 0 of h.
    """
    dtype = compute_dtype(compute, h.dtype)
    with arithmetic(h, compute):
        h, B = _scaled(h, B, scalings[branch], dtype)
        h = h if share is None else h * share
        h, B = h.to(dtype), B.to(dtype)
        if offsets is None:
            delta = torch.matmul(h, B.mT)
        else:
            B = F.pad(B, (0, h.shape[1] - B.shape[2])).contiguous()
            delta = grouped(h, B.mT, offsets)
    return y + delta.to(y.dtype)


def block_diagonal(weight: Tensor, blocks: int) -> Tensor:
    """Put the chunks of the rows on a diagonal: (m, n) -> (m, blocks * n)."""
    return torch.block_diag(*weight.chunk(blocks))


def diagonal(B: Tensor, d: Tensor) -> Tensor:
    """Return B diag(d), B (out, r), d (r,): KaSA's singular values, arXiv 2412.06071, eq. 7."""
    return B * d


def perturb(A: Tensor, std: Tensor, prior: Tensor, noise: float) -> Tensor:
    """Return MonteCLoRA's A (r, in) of one step, drawn with the priors std (r,) and prior (n,)."""
    sizes = len(prior), A.shape[0], A.shape[1]
    return perturbed(A, std, prior, noise, sizes, run)


def norms(W: Tensor, A: Tensor, B: Tensor, scalings: Tensor, branch: int, factor: float) -> Tensor:
    """Return the norms of the rows of `W + s B A`; `scalings` are `factor` times s."""
    return row_norms(W, A, B, scalings[branch] / factor)


def packed_norms(
    tensors: list[Tensor],
    A: Tensor,
    B: Tensor,
    scalings: Tensor,
    branch: int,
    factor: float,
    packing: str,
) -> Tensor:
    """Return the same of a W that consists of `tensors`, as `packing` says."""
    return packed_row_norms(tensors, A, B, scalings[branch] / factor, packing)


def magnitude(
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


def delta(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor | None, transposed: bool) -> Tensor:
    """Add a low-rank product to a weight, in the weight's dtype: `W + s B A`, or `W + s Aᵀ Bᵀ`."""
    A, B = A.to(W.dtype), B.to(W.dtype)
    if scaling is not None:
        B = B * scaling
    return torch.addmm(W, A.t(), B.t()) if transposed else torch.addmm(W, B, A)


def _scaled(h: Tensor, B: Tensor, scaling: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale B where it is cast to a smaller dtype, which rounds it anyway, and else h."""
    if B.dtype.itemsize > dtype.itemsize:
        return h, B * scaling
    return h * scaling, B


def arithmetic(x: Tensor, compute: str):
    """Keep a named compute dtype under autocast; `activation` leaves autocast in charge."""
    if compute == ACTIVATION:
        return nullcontext()
    return autocast_off(x.device.type)
