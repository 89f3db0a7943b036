"""The norms of the rows of W + s B A, without forming it.

    ‖w + s b A‖² = ‖w‖² + 2 s ⟨b, A w⟩ + s² b (A Aᵀ) bᵀ        w: a row of W, b: the same row of B

W: (out, in)   A: (r, in)   B: (out, r). The largest tensor made on the way is (out, r).
"""

import torch
from torch import Tensor

from lora_fx.graph.autocast import autocast_off

LEAST = torch.finfo(torch.float32).tiny  # of a square, so that norms can be divided by


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor | float) -> Tensor:
    """Return the norms (out,), which no gradient goes through, in float32 or W's wider dtype.

    Liu et al. 2024, arXiv 2402.09353, eq. 5, and §4.3 for the gradient. W is read twice, in its own
    dtype, to which A is rounded; sums are in float32. A row of zeros has the norm 1e-19, by which
    can be divided.
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    W, A, B = W.detach(), A.detach().to(W.dtype), B.detach().to(wide)
    with autocast_off(W.device.type):
        own = torch.linalg.vector_norm(W, dim=1, dtype=wide)
        inner = torch.mm(W, A.t()).to(wide)
        gram = torch.mm(A.to(wide), A.to(wide).t())
        branch = (B * (2 * inner + scaling * torch.mm(B, gram))).sum(1)
        return (own.square() + scaling * branch).clamp_min(LEAST).sqrt()
