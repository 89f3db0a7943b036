"""A singular value decomposition of the largest values only."""

import torch
from torch import Tensor


def randomised_svd(
    matrix: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, rank), S (rank,) and Vᵀ (rank, n) in the space that subspace iteration finds.

    Halko et al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    start = torch.randn(matrix.shape[1], rank, generator=generator)
    Q, _ = torch.linalg.qr(matrix @ start.to(matrix))
    for _ in range(iterations):
        Q, _ = torch.linalg.qr(matrix.T @ Q)
        Q, _ = torch.linalg.qr(matrix @ Q)
    U, S, V = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, V
