"""A change of a weight as A and B, the best of their rank: Eckart and Young 1936.

    Δ = U S Vᵀ      B = Uₖ Sₖ (out, k)   A = Vₖᵀ (k, in)      error = ‖Δ − B A‖ / ‖Δ‖

k is a rank, or the least that keeps a share of Σ S². Of a convolution's groups each is decomposed
by itself. Where k is the rank of Δ, the error is that of rounding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Rank = int | float  # a float is a share of what is kept


@dataclass(frozen=True)
class LowRank:
    """A (r, in), B (out, r / groups), and the relative error in the Frobenius norm."""

    A: Tensor
    B: Tensor
    error: float


@torch.no_grad()
def low_rank(delta: Tensor, rank: Rank, groups: int = 1) -> LowRank:
    """Return the best factors of a change (out, in), in its dtype."""
    parts = [torch.linalg.svd(part, full_matrices=False) for part in delta.chunk(groups)]
    k = max(_count(S, rank, groups) for _, S, _ in parts)
    A = torch.cat([V[:k] for _, _, V in parts])
    B = torch.cat([U[:, :k] * S[:k] for U, S, _ in parts])
    left = math.sqrt(sum(S[k:].double().square().sum().item() for _, S, _ in parts))
    whole = delta.double().norm().item()
    return LowRank(A.contiguous(), B.contiguous(), left / whole if whole else 0.0)


def _count(S: Tensor, rank: Rank, groups: int) -> int:
    if isinstance(rank, int):
        return min(max(rank // groups, 1), len(S))
    kept = S.double().square().cumsum(0)
    return min(int((kept < rank * kept[-1]).sum()) + 1, len(S))


def is_rank(value: object) -> bool:
    """Whether this is a rank of at least 1, or a share above 0 and up to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1
