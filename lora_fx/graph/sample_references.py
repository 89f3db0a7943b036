"""What samples compute that have factors of their own: see `graph/ops.py`, and `graph/picked.py`.

A sample has at most k adapters with a share, of the N that there are; where k is 1, it computes
what it would compute alone, whatever N is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph import references
from lora_fx.graph.references import arithmetic
from lora_fx.graph.structure import Branch, compute_dtype


def choose(samples: Tensor, columns: Sequence[int], terms: int) -> Tensor:
    """Return which of some branches each sample has: samples (S, adapters) -> int64 (S, terms).

    They are places in `columns`, where the branches' shares stand, or -1 where there are fewer.
    """
    own = picked_out(samples, columns, 1)
    sizes = own.abs()
    places = sizes.argmax(1, keepdim=True) if terms == 1 else sizes.topk(terms, 1).indices
    return torch.where(own.gather(1, places) == 0, -1, places)


def sample_scalings(
    samples: Tensor,
    scalings: Tensor,
    columns: Sequence[int],
    branches: Sequence[int],
    which: Tensor,
) -> Tensor:
    """Return s c of what `choose` returned, 0 for -1: scalings (all branches,) -> (S, terms)."""
    places = which.clamp(0)
    shares = picked_out(samples, columns, 1).gather(1, places)
    factors = shares * picked_out(scalings, branches, 0)[places]
    return torch.where(which < 0, 0, factors)


def take(stack: Tensor, which: Tensor, columns: bool) -> Tensor:
    """Take factors for each sample out of a stack (N, r, n): which (S, k) -> (S, k r, n).

    Or, by columns, (N, n, r) -> (S, n, k r). For -1 it gets zeros. A factor that no sample has is
    not read.
    """
    own = stack.index_select(0, which.flatten().clamp(0))
    own = own.masked_fill((which < 0).view(-1, 1, 1), 0).unflatten(0, which.shape)
    return own.transpose(1, 2).flatten(2) if columns else own.flatten(1, 2)


def sample_shrink(x: Tensor, A: Tensor, dropout: float, compute: str) -> Tensor:
    """Project each sample by its own factors: x (S, …, in), A (S, q, in) -> (S, …, q).

    Of a sample there are any number of rows (S, T, in), or one (S, in).
    """
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with arithmetic(x, compute):
        return _product(x.to(dtype), A.to(dtype))


def sample_expand(y: Tensor, h: Tensor, B: Tensor, factors: Tensor, compute: str) -> Tensor:
    """Add to each sample what its own factors make: `y + (f h) Bᵀ`.

    y (S, …, out), h (S, …, k r), B (S, out, k r), f (S, k), each for r values -> y's shape
    """
    dtype = compute_dtype(compute, h.dtype)
    with arithmetic(h, compute):
        each = factors.repeat_interleave(B.shape[2] // factors.shape[1], 1)
        if B.dtype.itemsize > dtype.itemsize:
            B = B * each.unsqueeze(1)
        else:
            h = h * (each if h.ndim == 2 else each.unsqueeze(1))
        delta = _product(h.to(dtype), B.to(dtype))
    return y + delta.to(y.dtype)


def spread(values: Tensor, columns: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Pick columns, each as often as its branch has rank: values (…, n) -> (…, Σ r)."""
    kept = [-1] * values.ndim
    wide = [
        values.narrow(-1, first, count).unsqueeze(-1).expand(*kept, rank).flatten(-2)
        for first, count, rank in runs(columns, ranks)
    ]
    return torch.cat(wide, -1) if len(wide) > 1 else wide[0]


def masked_expand(
    y: Tensor, h: Tensor, B: Tensor, scalings: Tensor, shares: Tensor, compute: str
) -> Tensor:
    """Add to each sample what it has of factors beside each other: `y + (c h) (s B)ᵀ`.

    y (S, …, out), h (S, …, q), B (out, q), s (q,), c (S, q) -> y's shape
    """
    dtype = compute_dtype(compute, h.dtype)
    with arithmetic(h, compute):
        if B.dtype.itemsize > dtype.itemsize:
            B = B * scalings
        else:
            h = h * scalings
        h = h * shares.reshape(-1, *[1] * (h.ndim - 2), shares.shape[1])
        delta = F.linear(h.to(dtype), B.to(dtype))
    return y + delta.to(y.dtype)


def many(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scalings: Tensor,
    samples: Tensor,
    branch: Branch,
) -> Tensor:
    """Add a branch of many adapters, one after another: A (N, r, in), B (N, out, r)."""
    column = branch.column
    assert column is not None
    for i in range(branch.many):
        h = references.shrink(x, A[i], branch.dropout, branch.compute)
        share = references.share(samples, column + i, False, h.ndim)
        y = references.expand(y, h, B[i], scalings, i, branch.compute, None, share)
    return y


def runs(columns: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (first, count, rank) of columns that follow each other and have one rank."""
    found: list[tuple[int, int, int]] = []
    for column, rank in zip(columns, ranks, strict=True):
        if found and (sum(found[-1][:2]), found[-1][2]) == (column, rank):
            found[-1] = (found[-1][0], found[-1][1] + 1, rank)
        else:
            found.append((column, 1, rank))
    return found


def picked_out(values: Tensor, columns: Sequence[int], dim: int) -> Tensor:
    """Pick by numbers that are known when the graph is made: no index has to be copied."""
    first, count = columns[0], len(columns)
    if list(columns) == list(range(first, first + count)):
        return values.narrow(dim, first, count)
    return torch.stack([values.select(dim, column) for column in columns], dim)


def _product(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply each sample's rows, or its one, by its own matrix turned."""
    if x.ndim == 2:
        return torch.bmm(x.unsqueeze(1), factors.mT).squeeze(1)
    return torch.bmm(x, factors.mT)
