"""Which elements dropout keeps, said by a seed: the plain reference of what kernels draw.

    bits(i, j) = mixed(aᵢ + bᵢ j)          of row i and column j, of 32, all modulo 2³²

An element is kept if its bits are at least p 2³². aᵢ and bᵢ, which is odd, are hashes of the row
with either half of the seed. `mixed` is the inner part of a hash with two multiplications, whose
bias is 0.11 (https://github.com/skeeto/hash-prospector). An element's bits are the same wherever a
kernel meets it, and take some ten instructions and no exchange between threads; of Philox, which
torch draws with, eight columns have to share a draw to take as few. `tests/kernels/test_kept.py`
holds what of chance is needed.
"""

import torch
from torch import Tensor

CHANCES = 1 << 32
ROW, OTHER = 0x9E3779B9, 0x85EBCA6B  # odd, so that no two rows start alike
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
_WORD = CHANCES - 1


def least_kept(p: float) -> int:
    """Return the least bits that keep an element; of all chances, at least one is to keep it."""
    return min(round(p * CHANCES), CHANCES - 1)


def stretch(p: float) -> float:
    """Return what a kept element is multiplied by, so that its mean is what it was."""
    return CHANCES / (CHANCES - least_kept(p))


def kept(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return which of (rows, columns) are kept, bool; the seed is int64, of no dimension."""
    i = torch.arange(rows, device=seed.device)[:, None]
    j = torch.arange(columns, device=seed.device)
    a = _hashed((i * ROW + (seed & _WORD)) & _WORD)
    b = _hashed((i * OTHER + ((seed >> 32) & _WORD)) & _WORD) | 1
    return _mixed((a + b * j) & _WORD) >= least_kept(p)


def _hashed(x: Tensor) -> Tensor:
    x = _mixed(x)
    return x ^ (x >> 15)


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * FIRST) & _WORD
    return ((x ^ (x >> 15)) * SECOND) & _WORD
