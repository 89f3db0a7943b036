"""The Triton kernel behind `lora_fx::expand_backward`; imported where there is a GPU."""

# pyright: reportMissingImports=false, reportIndexIssue=false
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # of a tile: the least that a warpgroup's matrix instruction takes


def launch(dy: Tensor, B: Tensor, h: Tensor, dh: Tensor, dB: Tensor, columns: int, rows: int):
    """Fill `dh` (parts of n, m, r) and `dB` (parts of m, n, r), float32 and contiguous."""
    (m, n), r = dy.shape, B.shape[1]
    _kernel[dh.shape[0], dB.shape[0]](
        dy, B, h, dh, dB, m, n, r,
        *dy.stride(), *B.stride(), *h.stride(),
        PART=rows, TILE=_ROWS, COLUMNS=columns, RANK=max(16, triton.next_power_of_2(r)),
        num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def _kernel(
    dy, B, h, dh, dB, m, n, r, dy0, dy1, B0, B1, h0, h1,
    PART: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    part_n, part_m = tl.program_id(0), tl.program_id(1)
    ranks = tl.arange(0, RANK)[None, :]
    columns = part_n * COLUMNS + tl.arange(0, COLUMNS)
    inside = (columns[:, None] < n) & (ranks < r)
    factor = tl.load(B + columns[:, None] * B0 + ranks * B1, mask=inside, other=0.0)
    total = tl.zeros((COLUMNS, RANK), tl.float32)
    first = part_m * PART
    for start in range(first, tl.minimum(first + PART, m), TILE):
        rows = start + tl.arange(0, TILE)[:, None]
        within = (rows < m) & (ranks < r)
        place = rows.to(tl.int64)
        tile = tl.load(
            dy + place * dy0 + columns[None, :] * dy1,
            mask=(rows < m) & (columns[None, :] < n),
            other=0.0,
        )
        hidden = tl.load(h + place * h0 + ranks * h1, mask=within, other=0.0)
        total = tl.dot(tl.trans(tile), hidden, total)
        own = dh + part_n.to(tl.int64) * m * r + place * r + ranks
        tl.store(own, tl.dot(tile, factor), mask=within)
    own = dB + part_m.to(tl.int64) * n * r + columns[:, None] * r + ranks
    tl.store(own, total, mask=inside)
