"""The Triton kernel behind `lora_fx::row_squares`; imported where there is a GPU."""

# pyright: reportMissingImports=false, reportIndexIssue=false
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.kernels.row_squares import ROWS

_TILE = 64, 4, 4  # columns, warps and stages


def launch(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor, partial: Tensor, part: int) -> None:
    """Fill `partial` (parts of the columns, out), float32 and contiguous."""
    (out, n), r = W.shape, A.shape[0]
    columns, warps, stages = _TILE
    _kernel[triton.cdiv(out, ROWS), partial.shape[0]](
        W, A, B, scaling, partial, out, n, r, *W.stride(), *A.stride(), *B.stride(),
        PART=part, TILE=ROWS, COLUMNS=columns, RANK=max(16, triton.next_power_of_2(r)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _kernel(
    W, A, B, scaling, partial, out, n, r, W0, W1, A0, A1, B0, B1,
    PART: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    ranks = tl.arange(0, RANK)
    place = rows.to(tl.int64)
    inside = (rows < out) & (ranks[None, :] < r)
    b = tl.load(B + place * B0 + ranks[None, :] * B1, mask=inside, other=0.0)
    b = b.to(tl.float32) * tl.load(scaling)
    high = b.to(W.dtype.element_ty)
    low = (b - high.to(tl.float32)).to(W.dtype.element_ty)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    first = tl.program_id(1) * PART
    for start in range(first, tl.minimum(first + PART, n), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        known = columns < n
        at = place * W0 + columns.to(tl.int64) * W1
        w = tl.load(W + at, mask=(rows < out) & known, other=0.0)
        at = ranks[:, None] * A0 + columns * A1
        a = tl.load(A + at, mask=(ranks[:, None] < r) & known, other=0.0).to(w.dtype)
        own = tl.dot(high, a, tl.dot(low, a, w.to(tl.float32)))
        total += own * own
    own = partial + tl.program_id(1).to(tl.int64) * out + rows
    tl.store(own, tl.sum(total, 1)[:, None], mask=rows < out)
