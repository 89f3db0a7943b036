"""`init = orthogonal`: neither factor zero, their product zero."""

import torch
from torch import Tensor


def orthogonal(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A = (N₁ Q₀)ᵀ/10, B = N₂ᵀ Q₁/10, so that B A = 0. PEFT's `"orthogonal"`.

    Q₀ and Q₁ are the even and the odd rows of a random orthogonal matrix (r, r), N₁ (in, r/2) and
    N₂ (r/2, out) are normal. The rank is even. Computed in float64.
    """
    square = torch.randn(rank, rank, generator=generator).double()
    Q, _ = torch.linalg.qr(square)
    wide = torch.randn(in_features, rank // 2, generator=generator).double()
    high = torch.randn(rank // 2, out_features, generator=generator).double()
    A, B = (wide @ Q[0::2]).T / 10, high.T @ Q[1::2] / 10
    return A.float().contiguous(), B.float().contiguous()
