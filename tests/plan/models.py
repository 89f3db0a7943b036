"""Small models that are no transformers: pairwise different sizes."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """in 5, middle 7."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.up = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.down = nn.Linear(7, 5, bias=False)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)))


class Experts(nn.Module):
    """A layer that holds a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.experts = nn.ModuleList([Block(i) for i in range(3)])


class Tower(nn.Module):
    """A stack of blocks and a head of 11."""

    def __init__(self, layers: int = 3, block: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() if block else Block(i) for i in range(layers)])
        self.branches = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])
        self.head = nn.Linear(5, 11)


class Pair(nn.Module):
    """Two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Tower(2)
        self.decoder = Tower(4)


class Shared(nn.Module):
    """One linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = self.first
        self.other = nn.Linear(7, 3)
