"""The norms of the rows of W + s B A, without forming it.

    ‖w + s b A‖² = ‖w‖² + 2 s ⟨b, A w⟩ + s² b (A Aᵀ) bᵀ        w: a row of W, b: the same row of B

W: (out, in)   A: (r, in)   B: (out, r). The largest tensor made on the way is (out, r).
"""

import torch
from torch import Tensor

from lora_fx.graph.autocast import autocast_off
from lora_fx.graph.packed import packed_rows
from lora_fx.graph.packing import Packing

LEAST = torch.finfo(torch.float32).tiny  # of a square, so that norms can be divided by


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor | float) -> Tensor:
    """Return the norms (out,), which no gradient goes through, in float32 or W's wider dtype.

    Liu et al. 2024, arXiv 2402.09353, eq. 5, and §4.3 for the gradient. W is read twice, in its own
    dtype, to which A is rounded; sums are in float32. A row of zeros has the norm 1e-19, by which
    can be divided.
    """
    with autocast_off(W.device.type):
        wide = torch.promote_types(W.dtype, torch.float32)
        W, A, B = W.detach(), A.detach().to(W.dtype), B.detach()
        own = torch.linalg.vector_norm(W, dim=1, dtype=wide)
        return combined_norms(own, torch.mm(W, A.t()).to(wide), A, B, scaling)


def combined_norms(
    own: Tensor, inner: Tensor, A: Tensor, B: Tensor, scaling: Tensor | float
) -> Tensor:
    """Return the norms of W + s B A, given those of W (out,) and W Aᵀ (out, r)."""
    wide = inner.dtype
    A, B = A.to(wide), B.to(wide)
    branch = (B * (2 * inner + scaling * torch.mm(B, torch.mm(A, A.t())))).sum(1)
    return (own.square() + scaling * branch).clamp_min(LEAST).sqrt()


def packed_row_norms(
    tensors: list[Tensor], A: Tensor, B: Tensor, scaling: Tensor | float, packing: str
) -> Tensor:
    """Return the norms of the rows where W is in 4 or 8 bits, see `graph/packing.py`.

    In float32. A few rows of W are unpacked at a time.
    """
    with autocast_off(A.device.type):
        A, B = A.detach().to(Packing.parse(packing).dtype), B.detach()
        own, inner = packed_rows(tensors, A, packing)
        return combined_norms(own, inner, A, B, scaling)
