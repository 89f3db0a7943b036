"""The Triton kernels behind `kernels/dropped_products.py`; imported where there is a GPU."""

# pyright: reportMissingImports=false, reportIndexIssue=false
# pyright: reportPossiblyUnboundVariable=false
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.kernels import kept
from lora_fx.kernels.kept import least_kept, stretch

_PROGRAMS = 512  # some four for each multiprocessor of an H100
_SITES = 3  # that one launch takes, reading x once
_SHRINK = 64, 64, 4, 3  # rows, columns, warps and stages
_FACTORS = 64, 64, 4, 3
_EXPAND = 64, 128, 4, 1
_FIRST, _SECOND = tl.constexpr(kept.FIRST), tl.constexpr(kept.SECOND)
_ROW, _OTHER = tl.constexpr(kept.ROW), tl.constexpr(kept.OTHER)


def shrink(x: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return h (m, sites r)."""
    x, seeds = x if x.stride(1) == 1 else x.contiguous(), seeds.contiguous()
    (m, n), r = x.shape, A.shape[0] // len(seeds)
    rows, columns, warps, stages = _SHRINK
    part = _part(n, columns, triton.cdiv(m, rows))
    parts = triton.cdiv(n, part)
    partial = x.new_empty((parts, m, len(A)), dtype=x.dtype if parts == 1 else torch.float32)
    for own, factors, h in _together(seeds, A, partial.transpose(1, 2)):
        _shrink_kernel[triton.cdiv(m, rows), parts](
            x, factors, own, h, m, n, r, x.stride(0), *A.stride(), *partial.stride()[:2],
            stretch(p), SITES=len(own), LEAST=least_kept(p), PART=part, ROWS=rows, COLUMNS=columns,
            RANK=_padded(r), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0).to(x.dtype)


def factors(dh: Tensor, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dA (sites r, in), float32."""
    x, seeds = x if x.stride(1) == 1 else x.contiguous(), seeds.contiguous()
    (m, n), r = x.shape, dh.shape[1] // len(seeds)
    rows, columns, warps, stages = _FACTORS
    part = _part(m, rows, triton.cdiv(n, columns))
    partial = x.new_empty((triton.cdiv(m, part), dh.shape[1], n), dtype=torch.float32)
    for own, h, dA in _together(seeds, dh.t(), partial):
        _factors_kernel[triton.cdiv(n, columns), len(partial)](
            h, x, own, dA, m, n, r, *dh.stride(), x.stride(0), *partial.stride()[:2],
            stretch(p), part, SITES=len(own), LEAST=least_kept(p), ROWS=rows, COLUMNS=columns,
            RANK=_padded(r), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partial[0] if len(partial) == 1 else partial.sum(0)


def _together(seeds: Tensor, one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield as many sites as one launch takes, of what has them along a dimension."""
    r = one.shape[0] // len(seeds)
    for first in range(0, len(seeds), _SITES):
        count = min(_SITES, len(seeds) - first)
        of_sites = first * r, count * r
        yield seeds.narrow(0, first, count), one.narrow(0, *of_sites), other.narrow(1, *of_sites)


def expand(dh: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dx (m, in)."""
    m, n, sites, seeds = len(dh), A.shape[1], len(seeds), seeds.contiguous()
    rows, columns, warps, stages = _EXPAND
    r = A.shape[0] // sites
    dx = dh.new_empty((m, n))
    _expand_kernel[triton.cdiv(n, columns), triton.cdiv(m, rows)](
        dh, A, seeds, dx, m, n, r, *dh.stride(), *A.stride(), stretch(p),
        SITES=sites, LEAST=least_kept(p), ROWS=rows, COLUMNS=columns, RANK=_padded(r),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx


def _part(length: int, tile: int, programs: int) -> int:
    """Return how much of a length one program goes over, where there are so many without parts."""
    parts = max(1, _PROGRAMS // max(1, programs))
    return tile * max(1, triton.next_power_of_2(triton.cdiv(length, tile * parts)))


def _padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * _FIRST
    return (x ^ (x >> 15)) * _SECOND


@triton.jit
def _hashed(x):
    x = _mixed(x)
    return x ^ (x >> 15)


@triton.jit
def _start(seed, rows):
    """Where the rows start and how far they step from column to column, as in `kept.kept`."""
    rows = rows.to(tl.uint32)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _hashed(rows * _ROW + low), _hashed(rows * _OTHER + high) | 1


@triton.jit
def _is_kept(start, step, columns, LEAST: tl.constexpr):
    return _mixed(start + step * columns.to(tl.uint32)) >= LEAST


@triton.jit(do_not_specialize=["m"])
def _shrink_kernel(
    x, A, seeds, partial, m, n, r, x0, A0, A1, h0, h1, stretch,
    SITES: tl.constexpr, LEAST: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    ranks = tl.arange(0, RANK)[None, :]
    place = rows.to(tl.int64)
    start0, step0 = _start(tl.load(seeds), rows)
    total0 = tl.zeros((ROWS, RANK), tl.float32)
    if SITES > 1:
        start1, step1 = _start(tl.load(seeds + 1), rows)
        total1 = tl.zeros((ROWS, RANK), tl.float32)
    if SITES > 2:
        start2, step2 = _start(tl.load(seeds + 2), rows)
        total2 = tl.zeros((ROWS, RANK), tl.float32)
    first = tl.program_id(1) * PART
    for begin in range(first, tl.minimum(first + PART, n), COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        beside, above = columns[None, :], columns[:, None]
        tile = tl.load(x + place * x0 + beside, mask=(rows < m) & (beside < n), other=0.0)
        known = (ranks < r) & (above < n)
        at = A + ranks * A0 + above * A1
        a = tl.load(at, mask=known, other=0.0).to(tile.dtype)
        keep = _is_kept(start0, step0, beside, LEAST)
        total0 = tl.dot(tl.where(keep, tile, 0.0), a, total0)
        if SITES > 1:
            a = tl.load(at + r * A0, mask=known, other=0.0).to(tile.dtype)
            keep = _is_kept(start1, step1, beside, LEAST)
            total1 = tl.dot(tl.where(keep, tile, 0.0), a, total1)
        if SITES > 2:
            a = tl.load(at + 2 * r * A0, mask=known, other=0.0).to(tile.dtype)
            keep = _is_kept(start2, step2, beside, LEAST)
            total2 = tl.dot(tl.where(keep, tile, 0.0), a, total2)
    own = partial + tl.program_id(1).to(tl.int64) * h0 + place * h1 + ranks
    known = (rows < m) & (ranks < r)
    tl.store(own, total0 * stretch, mask=known)
    if SITES > 1:
        tl.store(own + r, total1 * stretch, mask=known)
    if SITES > 2:
        tl.store(own + 2 * r, total2 * stretch, mask=known)


@triton.jit(do_not_specialize=["m", "part"])
def _factors_kernel(
    dh, x, seeds, partial, m, n, r, h0, h1, x0, A0, A1, stretch, part,
    SITES: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    beside, above = columns[None, :], columns[:, None]
    ranks = tl.arange(0, RANK)[None, :]
    total0 = tl.zeros((COLUMNS, RANK), tl.float32)
    total1 = tl.zeros((COLUMNS, RANK), tl.float32)
    total2 = tl.zeros((COLUMNS, RANK), tl.float32)
    first = tl.program_id(1) * part
    for begin in range(first, tl.minimum(first + part, m), ROWS):
        rows = begin + tl.arange(0, ROWS)[:, None]
        place = rows.to(tl.int64)
        tile = tl.load(x + place * x0 + beside, mask=(rows < m) & (beside < n), other=0.0)
        known = (rows < m) & (ranks < r)
        at = dh + place * h0 + ranks * h1
        start, step = _start(tl.load(seeds), rows)
        own = tl.where(_is_kept(start, step, beside, LEAST), tile, 0.0)
        total0 = tl.dot(tl.trans(own), tl.load(at, mask=known, other=0.0), total0)
        if SITES > 1:
            start, step = _start(tl.load(seeds + 1), rows)
            own = tl.where(_is_kept(start, step, beside, LEAST), tile, 0.0)
            total1 = tl.dot(tl.trans(own), tl.load(at + r * h1, mask=known, other=0.0), total1)
        if SITES > 2:
            start, step = _start(tl.load(seeds + 2), rows)
            own = tl.where(_is_kept(start, step, beside, LEAST), tile, 0.0)
            total2 = tl.dot(tl.trans(own), tl.load(at + 2 * r * h1, mask=known, other=0.0), total2)
    own = partial + tl.program_id(1).to(tl.int64) * A0 + ranks.to(tl.int64) * A1 + above
    known = (above < n) & (ranks < r)
    tl.store(own, total0 * stretch, mask=known)
    if SITES > 1:
        tl.store(own + r.to(tl.int64) * A1, total1 * stretch, mask=known)
    if SITES > 2:
        tl.store(own + 2 * r.to(tl.int64) * A1, total2 * stretch, mask=known)


@triton.jit(do_not_specialize=["m"])
def _expand_kernel(
    dh, A, seeds, dx, m, n, r, h0, h1, A0, A1, stretch,
    SITES: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    place = rows.to(tl.int64)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for site in tl.static_range(SITES):
        at = place * h0 + (site * r + ranks)[None, :] * h1
        own = tl.load(dh + at, mask=(rows < m) & (ranks[None, :] < r), other=0.0)
        at = (site * r + ranks)[:, None] * A0 + columns * A1
        a = tl.load(A + at, mask=(ranks[:, None] < r) & (columns < n), other=0.0).to(own.dtype)
        begin, step = _start(tl.load(seeds + site), rows)
        keep = _is_kept(begin, step, columns, LEAST)
        total += tl.where(keep, tl.dot(own, a), 0.0)
    tl.store(dx + place * n + columns, total * stretch, mask=(rows < m) & (columns < n))
