"""The Triton kernel behind `merged_weights`; imported where a GPU is.

A program has some columns of one weight and goes down some of its rows; Q, of all products
together, stays with it. What it needs it takes out of a table, where each weight has a row.

Factors are split in three of bfloat16 that add up to the float32, and the tensor cores multiply
these: the sum of six such products is as near as that of float32 is.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
import struct
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.kernels.merged_weights import Sum

_ROWS, _COLUMNS, _TILES = 64, 128, 8  # a program has TILES times ROWS, one after the other
_OF_WEIGHT, _OF_PRODUCT = 6, 8  # columns of the table
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch(pairs: Sequence[tuple[Sum, Tensor]], precision: str = "bf16x6") -> None:
    """Fill the tensor beside each sum. All have the same dtypes and as many products.

    Triton's interpreter knows no other precision than "ieee".
    """
    first = pairs[0][0]
    P, Q, _ = first.products[0]
    device, products = first.weight.device, [one for of, _ in pairs for one in of.products]
    counts = [_programs(of.weight) for of, _ in pairs]
    begins = [0, *accumulate(counts)]
    rows = [_row(*pair, begin) for pair, begin in zip(pairs, begins, strict=False)]
    owners = torch.repeat_interleave(torch.tensor(counts)).to(torch.int32)
    ranks = max(sum(one.Q.shape[0] for one in of.products) for of, _ in pairs)
    narrow = first.weight.itemsize == 2 and ranks <= 16
    _merge[(len(owners),)](
        torch.tensor(rows).to(device, non_blocking=True), owners.to(device, non_blocking=True),
        len(first.products),
        DTYPE=_DTYPES[first.weight.dtype], P_DTYPE=_DTYPES[P.dtype], Q_DTYPE=_DTYPES[Q.dtype],
        ALIGNED=all(_is_aligned(of.weight, result) for of, result in pairs),
        ALONG=all(one.Q.stride(1) == 1 for one in products),
        RANK=max(16, triton.next_power_of_2(ranks)), ROWS=_ROWS, COLUMNS=_COLUMNS,
        TILES=_TILES, STAGES=3 if narrow else 2, OF_WEIGHT=_OF_WEIGHT, OF_PRODUCT=_OF_PRODUCT,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip


def _programs(weight: Tensor) -> int:
    m, n = weight.shape
    return -(-m // (_ROWS * _TILES)) * -(-n // _COLUMNS)


def _row(of: Sum, result: Tensor, begin: int) -> list[int]:
    weight = of.weight
    row = [begin, *weight.shape, weight.data_ptr(), weight.stride(0), result.data_ptr()]
    for P, Q, scaling in of.products:
        (bits,) = struct.unpack("q", struct.pack("d", scaling))
        row += [P.data_ptr(), *P.stride(), Q.data_ptr(), *Q.stride(), Q.shape[0], bits]
    return row


def _is_aligned(weight: Tensor, result: Tensor) -> bool:
    """Return whether each row begins where 16 bytes do, and ends there."""
    size = weight.itemsize
    begins = weight.data_ptr() % 16 == result.data_ptr() % 16 == weight.stride(0) * size % 16 == 0
    return begins and weight.shape[1] % 16 == 0


@triton.jit(do_not_specialize=["terms"])
def _merge(
    table, owners, terms,
    DTYPE: tl.constexpr, P_DTYPE: tl.constexpr, Q_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ALONG: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, OF_WEIGHT: tl.constexpr, OF_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    row = table + owner * (OF_WEIGHT + terms * OF_PRODUCT)
    program = tl.program_id(0) - tl.load(row).to(tl.int32)
    m, n = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    weight, stride = tl.load(row + 3), tl.load(row + 4)
    merged = tl.load(row + 5).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    across = tl.cdiv(n, COLUMNS)

    ranks, first = tl.arange(0, RANK), 0
    at_P, P_step = tl.zeros((RANK,), tl.int64), tl.zeros((RANK,), tl.int64)
    at_Q, Q_step = tl.zeros((RANK,), tl.int64), tl.zeros((RANK,), tl.int64)
    scaling = tl.zeros((RANK,), tl.float32)
    for term in range(terms):
        own = row + OF_WEIGHT + term * OF_PRODUCT
        rank = tl.load(own + 6).to(tl.int32)
        here, place = (ranks >= first) & (ranks < first + rank), (ranks - first).to(tl.int64)
        P_BYTES: tl.constexpr = P_DTYPE.primitive_bitwidth // 8
        Q_BYTES: tl.constexpr = Q_DTYPE.primitive_bitwidth // 8
        at_P = tl.where(here, tl.load(own) + place * tl.load(own + 2) * P_BYTES, at_P)
        at_Q = tl.where(here, tl.load(own + 3) + place * tl.load(own + 4) * Q_BYTES, at_Q)
        P_step = tl.where(here, tl.load(own + 1), P_step)
        Q_step = tl.where(here, tl.load(own + 5), Q_step)
        factor = tl.load(own + 7).to(tl.float64, bitcast=True).to(tl.float32)
        scaling = tl.where(here, factor, scaling)
        first += rank
    there = ranks < first

    columns = (program % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    from_Q = at_Q.to(tl.pointer_type(Q_DTYPE))[:, None]
    from_Q = from_Q + columns if ALONG else from_Q + columns * Q_step[:, None]
    Q = tl.load(from_Q, mask=there[:, None] & (columns < n), other=0.0).to(tl.float32)
    Q *= scaling[:, None]
    from_P = at_P.to(tl.pointer_type(P_DTYPE))[None, :]
    top = (program // across) * (ROWS * TILES)
    for start in tl.range(top, tl.minimum(top + ROWS * TILES, m), ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)[:, None]
        inside = (rows < m) & (columns < n)
        source = weight.to(tl.pointer_type(DTYPE)) + rows.to(tl.int64) * stride + columns
        target = merged + rows.to(tl.int64) * n + columns
        if ALIGNED:
            source, target = tl.multiple_of(source, (1, 16)), tl.multiple_of(target, (1, 16))
        W = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        P = tl.load(from_P + rows * P_step[None, :], mask=(rows < m) & there[None, :], other=0.0)
        W += tl.dot(P.to(tl.float32), Q, input_precision=PRECISION)
        tl.store(target, W, mask=inside)
