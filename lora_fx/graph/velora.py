"""VeLoRA: what is kept of an input for the gradient of A is its projection on one direction.

    c = x Pᵀ    x̂ = scale · c P    dA = dhᵀ x̂        P: (groups, in), the direction v on a diagonal

x: (*, in)   c: (*, groups)   v: (width,), of norm 1, width = ⌈in / groups⌉; the last group may end
early. Miles et al. 2024, arXiv 2405.17991, §3.1, eq. 3 and 4. The product itself and dx are exact.
"""

import torch
from torch import Tensor


def width_of(in_features: int, groups: int) -> int:
    """Return the length of a group, and so of the direction."""
    return -(-in_features // groups)


def projection(v: Tensor, groups: int, in_features: int) -> Tensor:
    """Return P (groups, in)."""
    return torch.block_diag(*[v.unsqueeze(0)] * groups)[:, :in_features]


def mean_direction(x: Tensor, groups: int, own: Tensor | None = None) -> Tensor:
    """Return the mean of all groups of x (*, in) as a float32 vector (width,) of norm 1.

    Of x (S, …, in) only the samples that are `own` (S,) count, if there is such a mask. A mean that
    is zero gives a vector of equal elements.
    """
    in_features = x.shape[-1]
    width = width_of(in_features, groups)
    x = x.detach()
    if own is not None:
        each = x.reshape(x.shape[0], -1, in_features).sum(1, dtype=torch.float32)
        x = torch.where(own.unsqueeze(1), each, 0)
    total = x.reshape(-1, in_features).sum(0, dtype=torch.float32)
    padded = torch.nn.functional.pad(total, (0, groups * width - in_features))
    mean = padded.reshape(groups, width).sum(0)
    mean = torch.where(mean.any(), mean, torch.ones_like(mean))
    return mean / torch.linalg.vector_norm(mean)
