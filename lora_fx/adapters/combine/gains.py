"""A mix with DoRA adapters in it, as one DoRA adapter.

A part makes diag(gᵢ) W + sᵢ Bᵢ Aᵢ of W (`part.py`), so that with B A = Σ wᵢ sᵢ Bᵢ Aᵢ the mix is

    W + Σ wᵢ (diag(gᵢ) W + sᵢ Bᵢ Aᵢ − W) = diag(c) W + B A      c = 1 + Σ wᵢ (gᵢ − 1)
                                         = diag(m / n) (W + B′ A)

with B′ = diag(1 / c) B, n = ‖W + B′ A‖ of rows and m = c n: exact, whatever the number of adapters.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fx.adapters.combine.part import Part
from lora_fx.graph.row_norms import row_norms

LEAST = 1e-3  # of c, by which is divided


def common_gain(parts: Sequence[Part]) -> Tensor | None:
    """Return c (out,), None if no part has a gain: the mix is plain LoRA then."""
    moved = [part.weight * (part.gain - 1) for part in parts if part.gain is not None]
    return torch.stack(moved).sum(0) + 1 if moved else None


def with_gain(W: Tensor, A: Tensor, B: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return B′ (out, r) and m (out,) of diag(c) W + B A, W (out, in)."""
    B = B / c[:, None]
    return B, c * row_norms(W, A, B, 1.0)
