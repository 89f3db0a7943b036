"""The Triton kernels behind `lora_fx::picked_shrink` and `picked_expand`; imported on a GPU.

A program has rows of one sample. It takes the pointer to the sample's factor out of those of the
tensors that it is given, so that nothing is gathered first.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = {True: 512, False: 128}  # columns at once: of single rows, of tiles
_COLUMNS = {True: 256, False: 128}  # of an output's tile
_MOST_ROWS = 64
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def shrink(
    x: Tensor,
    A: Sequence[Tensor],
    which: Tensor,
    h: Tensor,
    rank: int,
    part: int,
    dtype: torch.dtype,
) -> None:
    """Fill `h` (parts, S, T, k rank), float32 and contiguous."""
    S, T, n = x.shape
    rows = _rows(T)
    grid = S * triton.cdiv(T, rows), h.shape[0]
    _shrink[grid](
        x, which=which, h=h, S=S, T=T, n=n, x0=x.stride(0), x1=x.stride(1), x2=x.stride(2),
        **_sources(A, -2), TERMS=which.shape[1], WIDTH=rank,
        RANK=max(16, triton.next_power_of_2(rank)), ROWS=rows, PART=part,
        STEP=min(part, _STEP[rows == 1]), DTYPE=_DTYPES[dtype],
        num_warps=4, num_stages=3,
    )  # fmt: skip


def expand(
    y: Tensor,
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Tensor,
    z: Tensor,
    dtype: torch.dtype,
) -> None:
    """Fill `z` (S, T, out), contiguous."""
    S, T, n = y.shape
    rows = _rows(T)
    h = h.contiguous()
    columns, rank = _COLUMNS[rows == 1], h.shape[-1] // which.shape[1]
    grid = triton.cdiv(n, columns), S * triton.cdiv(T, rows)
    _expand[grid](
        y, h, which=which, shares=shares, scalings=scalings, z=z, S=S, T=T, n=n,
        y0=y.stride(0), y1=y.stride(1), y2=y.stride(2),
        shares0=shares.stride(0), shares1=shares.stride(1), scalings0=scalings.stride(0),
        **_sources(B, -1), PARTS=h.shape[0], TERMS=which.shape[1], WIDTH=rank,
        RANK=max(16, triton.next_power_of_2(rank)), ROWS=rows, COLUMNS=columns,
        DTYPE=_DTYPES[dtype], num_warps=4,
    )  # fmt: skip


def _rows(T: int) -> int:
    return 1 if T == 1 else min(_MOST_ROWS, max(16, triton.next_power_of_2(T)))


def _sources(factors: Sequence[Tensor], dim: int) -> dict[str, Any]:
    """Return what kernels take for factors, whose ranks are their sizes in a dimension."""
    held = [one.contiguous() for one in factors]
    single = [one for one in held if one.dim() == 2]
    return {
        "many": held[-1],
        "single": tuple(single or held),
        "SINGLE": len(single),
        "RANKS": tuple(one.shape[dim] for one in single),
        "LAST": held[-1].shape[dim],
    }


@triton.jit
def _source(
    place, size, many, single, SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr
):
    """Return the pointer to a factor and its rank; those of many have `size` values each."""
    pointer = many + (place - SINGLE).to(tl.int64) * size
    rank = tl.full((), LAST, tl.int32)
    for i in tl.static_range(SINGLE):
        pointer = tl.where(place == i, single[i], pointer)
        rank = tl.where(place == i, RANKS[i], rank)
    return pointer, rank


@triton.jit(do_not_specialize=["S", "T"])
def _shrink(
    x, many, single, which, h, S, T, n, x0, x1, x2,
    SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr, TERMS: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    STEP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    tile, part = tl.program_id(0), tl.program_id(1)
    sample = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    ranks = tl.arange(0, RANK)
    from_sample = x + sample * x0
    to_sample = h + ((part.to(tl.int64) * S + sample) * T + rows) * (TERMS * WIDTH)
    for term in tl.static_range(TERMS):
        place = tl.load(which + sample * TERMS + term)
        total = tl.zeros((ROWS, RANK), tl.float32)
        if place >= 0:
            pointer, rank = _source(place, LAST * n, many, single, SINGLE, RANKS, LAST)
            for start in range(part * PART, part * PART + PART, STEP):
                columns = start + tl.arange(0, STEP)
                factor = tl.load(
                    pointer + ranks[:, None] * n + columns[None, :],
                    mask=(ranks[:, None] < rank) & (columns[None, :] < n),
                    other=0.0,
                ).to(DTYPE)
                if ROWS == 1:
                    values = tl.load(from_sample + columns * x2, mask=columns < n, other=0.0)
                    values = values.to(DTYPE).to(tl.float32)[None, :]
                    total += tl.sum(factor.to(tl.float32) * values, 1)[None, :]
                else:
                    values = tl.load(
                        from_sample + rows * x1 + columns[None, :] * x2,
                        mask=(rows < T) & (columns[None, :] < n),
                        other=0.0,
                    ).to(DTYPE)
                    total = tl.dot(values, tl.trans(factor), total, input_precision="ieee")
        inside = (rows < T) & (ranks[None, :] < WIDTH)
        tl.store(to_sample + term * WIDTH + ranks[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["S", "T"])
def _expand(
    y, h, many, single, which, shares, scalings, z, S, T, n,
    y0, y1, y2, shares0, shares1, scalings0,
    SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr, PARTS: tl.constexpr,
    TERMS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    tile = tl.program_id(1)
    sample = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)[None, :]
    inside = (rows < T) & (columns[None, :] < n)
    own = y + sample * y0 + rows * y1 + columns[None, :] * y2
    total = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    for term in tl.static_range(TERMS):
        place = tl.load(which + sample * TERMS + term)
        if place >= 0:
            pointer, rank = _source(place, LAST * n, many, single, SINGLE, RANKS, LAST)
            scaling = tl.load(shares + sample * shares0 + term * shares1)
            scaling *= tl.load(scalings + place * scalings0)
            hidden = tl.zeros((ROWS, RANK), tl.float32)
            for part in range(PARTS):
                start = h + ((part * S + sample) * T + rows) * (TERMS * WIDTH) + term * WIDTH
                hidden += tl.load(start + ranks, mask=(rows < T) & (ranks < WIDTH), other=0.0)
            hidden = (hidden * scaling).to(DTYPE)
            factor = tl.load(
                pointer + columns[:, None] * rank + ranks,
                mask=(columns[:, None] < n) & (ranks < rank),
                other=0.0,
            ).to(DTYPE)
            if ROWS == 1:
                products = factor.to(tl.float32) * hidden.to(tl.float32)
                total += tl.sum(products, 1)[None, :]
            else:
                total = tl.dot(hidden, tl.trans(factor), total, input_precision="ieee")
    tl.store(z + (sample * T + rows) * n + columns[None, :], total, mask=inside)
