"""Small marked modules with adapters that are not zero."""

import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.factors import Arithmetic
from lora_fx.adapters.sites.site import Site


def add_adapter(
    linear: nn.Linear,
    name: str,
    rank: int,
    scaling: float = 0.7,
    dropout: float = 0.0,
    compute: str = "activation",
    magnitude: bool = False,
) -> Site:
    """Mark a linear, give it an adapter with random A and B, and activate all it has."""
    site = storage.mark(linear)
    factors = {
        "lora_A.weight": torch.randn(rank, linear.in_features) / 3,
        "lora_B.weight": torch.randn(linear.out_features, rank) / 3,
    }
    if magnitude:
        factors["lora_magnitude_vector"] = 1 + torch.rand(linear.out_features)
    storage.insert(site, name, factors, Arithmetic(1.0, scaling, False, dropout, compute), True)
    site.activate(tuple(site.lora_arithmetic))
    return site


class Block(nn.Module):
    """Three projections of one input, two of which add up: in 5, middle 7 and 11, out 3."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 7)
        self.up = nn.Linear(5, 7, bias=False)
        self.side = nn.Linear(5, 11)
        self.down = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.gate(x)) * self.up(x)) + self.side(x).sum(-1, keepdim=True)
