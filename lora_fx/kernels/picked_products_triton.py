"""The Triton kernels behind `lora_fx::picked_shrink` and `picked_expand`; imported on a GPU.

A program has rows of one sample. It takes the pointers to the sample's factors out of those of the
tensors that it is given, so that nothing is gathered first. Of tiles of rows, x is read once for
all sites; single rows are as many programs as there are sites, since there are few.

From Hopper on a kernel is started before the one ahead of it has ended (programmatic dependent
launch), and waits for it when it needs something that was computed. Before that `expand` reads B
and which of it a sample has: `shrink`, which is ahead of it, lets it start only after everything
has ended that is ahead of `shrink` itself.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_STEP = {True: 512, False: 128}  # columns at once: of single rows, of tiles
_COLUMNS = {True: 256, False: 128}  # of an output's tile
_MOST_ROWS = {"shrink": 64, "expand": 32}
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
    """Fill `h` (sites, parts, S, T, k rank), float32 and contiguous."""
    (S, T, n), (sites, parts) = x.shape, h.shape[:2]
    rows = _rows(T, "shrink")
    together = 1 if rows == 1 else triton.next_power_of_2(sites)
    _shrink[S * triton.cdiv(T, rows), parts, triton.cdiv(sites, together)](
        x, which=which.contiguous(), h=h, S=S, T=T,
        x0=x.stride(0), x1=x.stride(1), x2=x.stride(2), N=n,
        **_sources(A, sites, -2), **_sizes(which, rank, rows, dtype),
        TOGETHER=together, PARTS=parts, PART=part, STEP=min(part, _STEP[rows == 1]),
        **_early(which), num_warps=4, num_stages=3,
    )  # fmt: skip


def expand(
    y: Sequence[Tensor],
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Sequence[Tensor],
    z: Sequence[Tensor],
    dtype: torch.dtype,
    gate: str,
) -> None:
    """Fill each of `z` (S, T, outᵢ), contiguous."""
    S, T, _ = y[0].shape
    rows, sites = _rows(T, "expand"), len(y)
    columns, rank = _COLUMNS[rows == 1], h.shape[-1] // which.shape[1]
    first = (0, *accumulate(triton.cdiv(one.shape[2], columns) for one in y))
    blocks = first[1 if gate else sites]
    _expand[(blocks * S * triton.cdiv(T, rows),)](
        tuple(one.contiguous() for one in y), h=h.contiguous(), which=which.contiguous(),
        shares=shares,
        scalings=tuple(one.contiguous() for one in scalings), z=tuple(z), S=S, T=T,
        shares0=shares.stride(0), shares1=shares.stride(1), GATE=gate, BLOCKS=blocks,
        **_sources(B, sites, -1), **_sizes(which, rank, rows, dtype),
        N=tuple(one.shape[2] for one in y), FIRST=first, PARTS=h.shape[1], COLUMNS=columns,
        **_early(which, *B), num_warps=4,
    )  # fmt: skip


def _early(*read_at_once: Tensor) -> dict[str, bool]:
    """Return what lets a kernel start before the one ahead of it has ended, where that is known.

    Not if what it reads at once has to be copied first.
    """
    device = read_at_once[0].device
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if early and all(one.is_contiguous() for one in read_at_once):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def _rows(T: int, of: str) -> int:
    return 1 if T == 1 else min(_MOST_ROWS[of], max(16, triton.next_power_of_2(T)))


def _sizes(which: Tensor, rank: int, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "TERMS": which.shape[1],
        "WIDTH": rank,
        "RANK": max(16, triton.next_power_of_2(rank)),
        "ROWS": rows,
        "DTYPE": _DTYPES[dtype],
    }


def _sources(factors: Sequence[Tensor], sites: int, dim: int) -> dict[str, Any]:
    """Return what kernels take for factors, whose ranks are their sizes in a dimension."""
    held = [one.contiguous() for one in factors]
    count = len(held) // sites
    single = [one for one in held if one.dim() == 2]
    of_first = [one for one in held[:count] if one.dim() == 2]
    return {
        "many": tuple(held[count - 1 :: count]),
        "single": tuple(single or held),
        "SITES": sites,
        "SINGLE": len(of_first),
        "RANKS": tuple(one.shape[dim] for one in of_first),
        "LAST": held[count - 1].shape[dim],
    }


@triton.jit
def _source(
    site, place, many, single, N: tl.constexpr,
    SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return the pointer to a factor of a site, and its rank."""
    pointer = many[site] + (place - SINGLE).to(tl.int64) * (LAST * N)
    rank = tl.full((), LAST, tl.int32)
    for i in tl.static_range(SINGLE):
        pointer = tl.where(place == i, single[site * SINGLE + i], pointer)
        rank = tl.where(place == i, RANKS[i], rank)
    return pointer, rank


@triton.jit(do_not_specialize=["S", "T"])
def _shrink(
    x, many, single, which, h, S, T, x0, x1, x2, N: tl.constexpr, SITES: tl.constexpr,
    SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr, TERMS: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
    TOGETHER: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, STEP: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tiles = tl.cdiv(T, ROWS)
    tile, part = tl.program_id(0), tl.program_id(1)
    sample = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, TOGETHER * RANK)
    site, ranks = tl.program_id(2) + lanes // RANK, lanes % RANK
    from_sample = x + sample * x0
    place_of_part = (site * PARTS + part).to(tl.int64) * S + sample
    to_sample = h + (place_of_part[None, :] * T + rows) * (TERMS * WIDTH)
    for term in tl.static_range(TERMS):
        place = tl.load(which + sample * TERMS + term)
        total = tl.zeros((ROWS, TOGETHER * RANK), tl.float32)
        if place >= 0:
            first, rank = _source(0, place, many, single, N, SINGLE, RANKS, LAST)
            pointers = first + ranks * N
            for i in tl.static_range(1, SITES):
                other, _ = _source(i, place, many, single, N, SINGLE, RANKS, LAST)
                pointers = tl.where(site == i, other + ranks * N, pointers)
            is_there = (site < SITES) & (ranks < rank)
            for start in range(part * PART, part * PART + PART, STEP):
                columns = start + tl.arange(0, STEP)
                factor = tl.load(
                    pointers[:, None] + columns[None, :],
                    mask=is_there[:, None] & (columns[None, :] < N),
                    other=0.0,
                ).to(DTYPE)
                if ROWS == 1:
                    values = tl.load(from_sample + columns * x2, mask=columns < N, other=0.0)
                    values = values.to(DTYPE).to(tl.float32)[None, :]
                    total += tl.sum(factor.to(tl.float32) * values, 1)[None, :]
                else:
                    values = tl.load(
                        from_sample + rows.to(tl.int64) * x1 + columns[None, :] * x2,
                        mask=(rows < T) & (columns[None, :] < N),
                        other=0.0,
                    ).to(DTYPE)
                    total = tl.dot(values, tl.trans(factor), total, input_precision="ieee")
        inside = (rows < T) & ((site < SITES) & (ranks < WIDTH))[None, :]
        tl.store(to_sample + term * WIDTH + ranks[None, :], total, mask=inside)


@triton.jit
def _total(
    site, block, y, h, many, single, which, shares, scalings, S, T, shares0, shares1, sample, rows,
    N: tl.constexpr, SINGLE: tl.constexpr, RANKS: tl.constexpr, LAST: tl.constexpr,
    TERMS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return a tile of a site's sum, float32."""
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)[None, :]
    inside = (rows < T) & (columns[None, :] < N)
    place = tl.load(which + sample * TERMS)
    pointer, rank = _source(site, place, many, single, N, SINGLE, RANKS, LAST)
    first = tl.load(
        pointer + columns[:, None] * rank + ranks,
        mask=(columns[:, None] < N) & (ranks < rank) & (place >= 0),
        other=0.0,
    ).to(DTYPE)
    if EARLY:
        gdc_wait()
    own = y[site] + (sample * T + rows) * N + columns[None, :]
    total = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    for term in tl.static_range(TERMS):
        place = tl.load(which + sample * TERMS + term)
        if place >= 0:
            scaling = tl.load(shares + sample * shares0 + term * shares1)
            scaling *= tl.load(scalings[site] + place)
            hidden = tl.zeros((ROWS, RANK), tl.float32)
            for part in range(PARTS):
                there = ((site * PARTS + part) * S + sample) * T + rows
                start = h + there * (TERMS * WIDTH) + term * WIDTH
                hidden += tl.load(start + ranks, mask=(rows < T) & (ranks < WIDTH), other=0.0)
            hidden = (hidden * scaling).to(DTYPE)
            factor = first
            if term > 0:
                pointer, rank = _source(site, place, many, single, N, SINGLE, RANKS, LAST)
                factor = tl.load(
                    pointer + columns[:, None] * rank + ranks,
                    mask=(columns[:, None] < N) & (ranks < rank),
                    other=0.0,
                ).to(DTYPE)
            if ROWS == 1:
                products = factor.to(tl.float32) * hidden.to(tl.float32)
                total += tl.sum(products, 1)[None, :]
            else:
                total = tl.dot(hidden, tl.trans(factor), total, input_precision="ieee")
    return total


@triton.jit
def _gated(x, GATE: tl.constexpr):
    if GATE == "silu":
        return x * tl.sigmoid(x)
    if GATE == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1.0 + libdevice.tanh(inner))


@triton.jit(do_not_specialize=["S", "T"])
def _expand(
    y, h, many, single, which, shares, scalings, z, S, T, shares0, shares1,
    N: tl.constexpr, FIRST: tl.constexpr, SITES: tl.constexpr, SINGLE: tl.constexpr,
    RANKS: tl.constexpr, LAST: tl.constexpr, TERMS: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, GATE: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    block, tile = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    sample = (tile // tiles).to(tl.int64)
    rows = (tile % tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    if GATE != "":
        gate = _total(
            0, block, y, h, many, single, which, shares, scalings, S, T, shares0, shares1, sample,
            rows, N[0], SINGLE, RANKS, LAST, TERMS, WIDTH, RANK, ROWS, DTYPE, PARTS, COLUMNS,
            EARLY,
        )  # fmt: skip
        up = _total(
            1, block, y, h, many, single, which, shares, scalings, S, T, shares0, shares1, sample,
            rows, N[0], SINGLE, RANKS, LAST, TERMS, WIDTH, RANK, ROWS, DTYPE, PARTS, COLUMNS,
            EARLY,
        )  # fmt: skip
        dtype = z[0].dtype.element_ty
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        columns = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        place = z[0] + (sample * T + rows) * N[0] + columns
        tl.store(place, _gated(gate, GATE) * up, mask=(rows < T) & (columns < N[0]))
    else:
        for i in tl.static_range(SITES):
            if (block >= FIRST[i]) & (block < FIRST[i + 1]):
                total = _total(
                    i, block - FIRST[i], y, h, many, single, which, shares, scalings, S, T,
                    shares0, shares1, sample, rows, N[i], SINGLE, RANKS, LAST, TERMS, WIDTH, RANK,
                    ROWS, DTYPE, PARTS, COLUMNS, EARLY,
                )  # fmt: skip
                columns = (block - FIRST[i]) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
                place = z[i] + (sample * T + rows) * N[i] + columns
                tl.store(place, total, mask=(rows < T) & (columns < N[i]))
