"""The Triton kernels behind `kernels/dropped_products.py`; imported where there is a GPU."""

# pyright: reportMissingImports=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.kernels.philox import COLUMNS, ROUNDS, gain, least_kept

_PROGRAMS = 512  # some four for each multiprocessor of an H100
_SHRINK = 64, 64, 4, 3  # rows, columns, warps and stages
_FACTORS = 64, 128, 4, 3
_EXPAND = 64, 64, 4, 3
_ROUNDS = tl.constexpr(ROUNDS)
_OCTET = tl.constexpr(COLUMNS)


def shrink(x: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return h (m, sites r)."""
    (m, n), sites = x.shape, len(seeds)
    rows, columns, warps, stages = _SHRINK
    r = A.shape[0] // sites
    part = _part(n, columns, triton.cdiv(m, rows) * sites)
    partial = x.new_empty((triton.cdiv(n, part), m, A.shape[0]), dtype=torch.float32)
    _shrink_kernel[sites, triton.cdiv(m, rows), partial.shape[0]](
        x, A, seeds, partial, m, n, r, sites, *x.stride(), *A.stride(), gain(p),
        LEAST=least_kept(p), PART=part, ROWS=rows, COLUMNS=columns, RANK=_padded(r),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial.sum(0, dtype=torch.float32).to(x.dtype)


def factors(dh: Tensor, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dA (sites r, in), float32."""
    (m, n), sites = x.shape, len(seeds)
    rows, columns, warps, stages = _FACTORS
    r = dh.shape[1] // sites
    part = _part(m, rows, triton.cdiv(n, columns) * sites)
    partial = x.new_empty((triton.cdiv(m, part), dh.shape[1], n), dtype=torch.float32)
    _factors_kernel[sites, triton.cdiv(n, columns), partial.shape[0]](
        dh, x, seeds, partial, m, n, r, sites, *dh.stride(), *x.stride(), gain(p), part,
        LEAST=least_kept(p), ROWS=rows, COLUMNS=columns, RANK=_padded(r),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial.sum(0)


def expand(dh: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dx (m, in)."""
    m, n, sites = len(dh), A.shape[1], len(seeds)
    rows, columns, warps, stages = _EXPAND
    r = A.shape[0] // sites
    dx = dh.new_empty((m, n))
    _expand_kernel[triton.cdiv(n, columns), triton.cdiv(m, rows)](
        dh, A, seeds, dx, m, n, r, *dh.stride(), *A.stride(), gain(p),
        SITES=sites, LEAST=least_kept(p), ROWS=rows, COLUMNS=columns, RANK=_padded(r),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx


def _part(length: int, tile: int, programs: int) -> int:
    """Return how much of a length one program goes over, where there are so many without parts."""
    parts = max(1, _PROGRAMS // max(1, programs))
    return tile * triton.next_power_of_2(triton.cdiv(length, tile * parts))


def _padded(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


@triton.jit
def _kept(seed, rows, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEAST: tl.constexpr):
    """Which of a tile are kept, from a column on that is a multiple of 8; `philox.kept` of it."""
    none = tl.zeros((ROWS, COLUMNS // _OCTET), tl.uint32)
    octets = (tl.arange(0, COLUMNS // _OCTET) + column // _OCTET)[None, :].to(tl.uint32) + none
    a, b, c, d = tl.philox(seed, octets, rows.to(tl.uint32) + none, none, none, _ROUNDS)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    halves = tl.join((words & 0xFFFF) >= LEAST, (words >> 16) >= LEAST)
    return tl.reshape(halves, (ROWS, COLUMNS))


@triton.jit(do_not_specialize=["m"])
def _shrink_kernel(
    x, A, seeds, partial, m, n, r, sites, x0, x1, A0, A1, gain,
    LEAST: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    site = tl.program_id(0)
    seed = tl.load(seeds + site)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    ranks = tl.arange(0, RANK)[None, :]
    place = rows.to(tl.int64)
    total = tl.zeros((ROWS, RANK), tl.float32)
    first = tl.program_id(2) * PART
    for start in range(first, tl.minimum(first + PART, n), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        at = place * x0 + columns[None, :] * x1
        tile = tl.load(x + at, mask=(rows < m) & (columns[None, :] < n), other=0.0)
        at = (site * r + ranks) * A0 + columns[:, None] * A1
        a = tl.load(A + at, mask=(ranks < r) & (columns[:, None] < n), other=0.0).to(tile.dtype)
        keep = _kept(seed, rows, start, ROWS, COLUMNS, LEAST)
        total = tl.dot(tl.where(keep, tile, 0.0), a, total)
    own = partial + (tl.program_id(2).to(tl.int64) * m + place) * (sites * r) + site * r + ranks
    tl.store(own, total * gain, mask=(rows < m) & (ranks < r))


@triton.jit(do_not_specialize=["m", "part"])
def _factors_kernel(
    dh, x, seeds, partial, m, n, r, sites, h0, h1, x0, x1, gain, part,
    LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    site = tl.program_id(0)
    seed = tl.load(seeds + site)
    column = tl.program_id(1) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK)[None, :]
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    first = tl.program_id(2) * part
    for start in range(first, tl.minimum(first + part, m), ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        place = rows.to(tl.int64)
        at = place * x0 + columns[None, :] * x1
        tile = tl.load(x + at, mask=(rows < m) & (columns[None, :] < n), other=0.0)
        at = place * h0 + (site * r + ranks) * h1
        own = tl.load(dh + at, mask=(rows < m) & (ranks < r), other=0.0)
        keep = _kept(seed, rows, column, ROWS, COLUMNS, LEAST)
        total = tl.dot(tl.trans(tl.where(keep, tile, 0.0)), own, total)
    row = tl.program_id(2) * (sites * r) + site * r + ranks
    own = partial + row.to(tl.int64) * n + columns[:, None]
    tl.store(own, total * gain, mask=(columns[:, None] < n) & (ranks < r))


@triton.jit(do_not_specialize=["m"])
def _expand_kernel(
    dh, A, seeds, dx, m, n, r, h0, h1, A0, A1, gain,
    SITES: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS
    columns = column + tl.arange(0, COLUMNS)[None, :]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    place = rows.to(tl.int64)
    ranks = tl.arange(0, RANK)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for site in tl.static_range(SITES):
        at = place * h0 + (site * r + ranks)[None, :] * h1
        own = tl.load(dh + at, mask=(rows < m) & (ranks[None, :] < r), other=0.0)
        at = (site * r + ranks)[:, None] * A0 + columns * A1
        a = tl.load(A + at, mask=(ranks[:, None] < r) & (columns < n), other=0.0).to(own.dtype)
        keep = _kept(tl.load(seeds + site), rows, column, ROWS, COLUMNS, LEAST)
        total += tl.where(keep, tl.dot(own, a), 0.0)
    tl.store(dx + place * n + columns, total * gain, mask=(rows < m) & (columns < n))
