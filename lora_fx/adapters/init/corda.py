"""`init = corda`: directions of the weight by how the layer's inputs use them."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place

_LARGEST_ERROR = 0.05


def corda(place: Place) -> tuple[Tensor, Tensor]:
    """Take A = √(Σ/s) Vᵀ C⁻¹ and B = U √(Σ/s), where W C = U Σ Vᵀ, of r directions.

    C (in, in) is the covariance of the inputs. `ipm` takes the first r, which the inputs use most,
    `kpm` the last. Yang et al. 2024, arXiv 2406.05223, §3. PEFT's `"corda"`.
    """
    covariance, inverse = _inverted(place.observed.to(place.weight))
    U, S, V = torch.linalg.svd(place.weight @ covariance, full_matrices=False)
    first = dict(place.init.arguments)["method"].name == "ipm"  # type: ignore[union-attr]
    chosen = slice(place.rank) if first else slice(-place.rank, None)
    root = (S[chosen] / place.scaling).sqrt()
    return root[:, None] * (V[chosen] @ inverse), U[:, chosen] * root


def _inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return C + d I and its inverse; d, a share of C's mean diagonal, grows till that is one."""
    unit = torch.eye(len(covariance)).to(covariance)
    damping = 0.01
    while True:
        damped = covariance + damping * covariance.diagonal().mean() * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < _LARGEST_ERROR:
            return damped, inverse
        damping *= 2
