"""Elementwise ways to combine tensors T_i of one shape with weights w_i.

    magnitude_prune   Σ wᵢ pruneᵢ                    prune: the share ρ of largest magnitude is kept
    dare_linear       Σ wᵢ dropᵢ                     drop: each kept with probability ρ, over ρ
    ties, dare_ties   Σ wᵢ Mᵢ Pᵢ / max(Σ Mᵢ, 1)      P: pruned, or dropped; M: has the elected sign

The elected sign of an element is that of Σ Pᵢ (`total`) or of Σ sign(Pᵢ) (`frequency`), + of zero.
Yadav et al. 2023 (TIES), arXiv 2306.01708, §3; Yu et al. 2023 (DARE), arXiv 2311.03099, §3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A way to combine: `cross_terms` makes of `linear` PEFT's sums of factors."""

    name: str
    density: float = 1.0
    sign: str = "total"
    cross_terms: bool = False


def apply(
    method: Method,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """Return the combination; `generator`, on the CPU, says what is dropped."""
    if method.name.startswith("dare"):
        kept = [_dropped(tensor, method.density, generator) for tensor in tensors]
    elif method.name in ("ties", "magnitude_prune"):
        kept = [_pruned(tensor, method.density) for tensor in tensors]
    else:
        kept = list(tensors)
    stacked = torch.stack(kept)
    scaled = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).reshape(
        -1, *(1,) * tensors[0].dim()
    )
    if not method.name.endswith("ties"):
        return scaled.sum(0)
    agrees = stacked.sign() == _elected(stacked, method.sign)
    return (scaled * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    count = int(density * tensor.numel())
    flat = tensor.flatten()
    largest = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).reshape(tensor.shape)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if not density:
        return torch.zeros_like(tensor)
    kept = torch.rand(tensor.shape, generator=generator) < density
    return tensor * kept.to(tensor.device) / density


def _elected(stacked: Tensor, sign: str) -> Tensor:
    votes = stacked if sign == "total" else stacked.sign()
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(stacked.dtype)
