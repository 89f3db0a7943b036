"""`init = gaussian`: A normal, B zero."""

import torch
from torch import Tensor


def gaussian(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A ~ N(0, 1/r²), B = 0. PEFT's `init_lora_weights="gaussian"`."""
    A = torch.empty(rank, in_features).normal_(0, 1 / rank, generator=generator)
    return A, torch.zeros(out_features, rank)
