"""Intruder dimensions: new directions among the largest of an adapted weight, made smaller.

    W' = W + Δ = U' S' V'ᵀ      j of the first k intrudes if max_i |u'_jᵀ u_i| < ε      W = U S Vᵀ
    Δ' = Δ − (1 − λ) Σ_j σ'_j u'_j v'_jᵀ

Shuttleworth et al. 2024, arXiv 2410.21228, §3 and §6. λ is the share of an intruder that is left;
PEFT's `reduce_intruder_dimension` computes the same, and describes λ the other way round.
"""

import torch
from torch import Tensor


@torch.no_grad()
def reduced(W: Tensor, delta: Tensor, first: int, near: float, left: float) -> tuple[Tensor, int]:
    """Return Δ' (out, in) and how many directions intruded."""
    U = torch.linalg.svd(W, full_matrices=False)[0]
    own_U, S, V = torch.linalg.svd(W + delta, full_matrices=False)
    likeness = (own_U[:, :first].t() @ U).abs().amax(1)
    intruders = (likeness < near).nonzero().flatten()
    parts = own_U[:, intruders] * S[intruders] @ V[intruders]
    return delta - (1 - left) * parts, len(intruders)
