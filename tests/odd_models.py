"""Small modules that do what few models do."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


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


class Blending(nn.Module):
    """Computes with all of its experts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 7, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("si,eoi->so", x, self.experts)


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


class Scaled(nn.Embedding):
    """Multiplies what it looks up, as Gemma's and BART's do."""

    embed_scale = 2.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Varied(nn.Module):
    """Every kind of layer once, and a head that shares the embedding's weight: ids below 11."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Scaled(11, 6, padding_idx=0)
        self.mix = Conv1D(7, 6)
        self.norm = nn.LayerNorm(7)
        self.counts = nn.BatchNorm1d(7)
        self.up = nn.Linear(7, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.Parameter(torch.randn(3, 6, 7) * 0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.mix(self.embed(ids))))
        x = self.counts(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.up(x) + F.linear(x, self.experts[1]) * F.linear(x, self.experts[2]))
