"""Small modules that do what few models do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Branching(nn.Module):
    """What it computes depends on the values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return 2 * y if y.sum() > 0 else y


class Failing(nn.Module):
    """Does not like its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            raise ValueError("one row at a time")
        return self.up(x)


class Reading(nn.Module):
    """Reads the weight of `proj` and of `gate`, and calls `up` and, of those two, `gate` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.gate = nn.Linear(7, 7, bias=False)
        self.proj = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.up(x))
        y = self.gate(y) @ self.gate.weight
        return F.linear(y, self.proj.weight)


class Layered(nn.Module):
    """Layers of one kind, and a head whose weight is read outside of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.cat([x, x]) @ self.head.weight.T


class Sometimes(nn.Module):
    """Calls `side` only if it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.side = nn.Linear(5, 7)

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        x = x.to(self.side.weight.dtype)
        return self.up(x) + self.side(x) if side else self.up(x)
