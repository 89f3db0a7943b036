"""Which elements dropout keeps, said by a seed: the plain reference of what kernels draw.

Philox4x32-7 (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; table 2: passes
BigCrush). Its key is the seed, its counter the column over 8 and the row; of the 128 bits 16 are
for each of 8 columns that stand side by side.
"""

import torch
from torch import Tensor

ROUNDS = 7
COLUMNS = 8  # of one counter
CHANCES = 1 << 16
_WORD = (1 << 32) - 1
_KEYS = 0x9E3779B9, 0xBB67AE85
_FACTORS = 0xD2511F53, 0xCD9E8D57


def least_kept(p: float) -> int:
    """Return the least of 16 bits that keeps an element: it is dropped in `p` of all cases.

    Of 65536 chances, at least one is to be kept.
    """
    return min(round(p * CHANCES), CHANCES - 1)


def gain(p: float) -> float:
    """Return what a kept element is multiplied by, so that its mean is what it was."""
    return CHANCES / (CHANCES - least_kept(p))


def kept(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return which of (rows, columns) are kept, bool; the seed is int64, of no dimension."""
    device = seed.device
    octets = torch.arange(-(-columns // COLUMNS), device=device)
    counter = [octets.expand(rows, -1), torch.arange(rows, device=device)[:, None]]
    a, b, c, d = torch.broadcast_tensors(*_philox(counter[0], counter[1], seed))
    halves = [half for word in (a, c, b, d) for half in (word & 0xFFFF, word >> 16)]
    drawn = torch.stack(halves, -1).flatten(1)[:, :columns]
    return drawn >= least_kept(p)


def _philox(c0: Tensor, c1: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c1)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        (low0, high0), (low1, high1) = _wide(c0, _FACTORS[0]), _wide(c2, _FACTORS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    return c0, c1, c2, c3


def _wide(one: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper 32 bits of a product of numbers of 32."""
    upper = (one >> 16) * factor + (((one & 0xFFFF) * factor) >> 16)
    return (one * factor) & _WORD, upper >> 16
