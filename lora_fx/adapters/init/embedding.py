"""Starts of an embedding's adapter, whose A has a column for each of its rows."""

import torch
from torch import Tensor


def zero_start(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw B ~ N(0, 1), A = 0. PEFT's `init_lora_weights=True` and `"gaussian"`."""
    B = torch.empty(out_features, rank).normal_(generator=generator)
    return torch.zeros(rank, in_features), B


def normal_start(
    in_features: int, out_features: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A and B ~ N(0, 1). PEFT's `init_lora_weights=False`."""
    A = torch.empty(rank, in_features).normal_(generator=generator)
    return A, torch.empty(out_features, rank).normal_(generator=generator)
