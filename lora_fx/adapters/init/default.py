"""`init = default`: A uniform, B zero, so that the adapted model starts as the base."""

import torch
from torch import Tensor

from lora_fx.adapters.init.uniform import kaiming_uniform


def default(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A ~ U(-1/√in, 1/√in), B = 0. PEFT's `init_lora_weights=True`."""
    return kaiming_uniform(rank, in_features, generator), torch.zeros(out_features, rank)
