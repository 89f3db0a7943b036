"""`init = random`: both factors drawn, so that the adapter acts from the start (for tests)."""

import torch
from torch import Tensor

from lora_fx.adapters.init.uniform import kaiming_uniform


def random(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A ~ U(-1/√in, 1/√in), B ~ U(-1/√r, 1/√r). PEFT's `init_lora_weights=False`."""
    A = kaiming_uniform(rank, in_features, generator)
    return A, kaiming_uniform(out_features, rank, generator)
