"""The structure key of a site: all that the rewrite needs to know, nothing that names a module."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

ACTIVATION = "activation"


@dataclass(frozen=True)
class Branch:
    """One adapter's low-rank branch at a site.

    `rank` is the inner dimension; `dropout` the probability applied to the branch's input (0 in
    evaluation); `compute` the dtype of its arithmetic, or `activation` for that of its input;
    `bias` says that B has a bias.
    """

    rank: int
    dropout: float = 0.0
    compute: str = ACTIVATION
    bias: bool = False

    def __str__(self) -> str:
        return f"r{self.rank}:p{self.dropout!r}:{self.compute}{':bias' * self.bias}"


@dataclass(frozen=True)
class Structure:
    """What `lora_fx::site` computes; equal for sites that may share one compiled graph.

    Its text is the `structure` argument of the op, and of `merge`, which tells `transposed` layers
    from `linear` ones. `kind` is `linear` or `embedding`; `padding` is the row of an embedding that
    has no gradient. Values that may change without a recompile
    (weights, scalings) are tensors and have no place here.
    """

    kind: str
    branches: tuple[Branch, ...]
    padding: int | None = None

    def __str__(self) -> str:
        padding = "" if self.padding is None else f"@{self.padding}"
        return f"{self.kind}{padding}[{'|'.join(map(str, self.branches))}]"

    def params(self, tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
        """Deal out the op's `params` to the branches: A, B and B's bias or None."""
        left = iter(tensors)
        return [(next(left), next(left), next(left) if b.bias else None) for b in self.branches]

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out): of an embedding, whose inputs are its rows, too."""
        return self.kind != "linear"

    @staticmethod
    @cache
    def parse(key: str) -> "Structure":
        """Read a key back; `Structure.parse(str(s)) == s`. Raises ValueError for any other text."""
        whole = re.fullmatch(r"(\w+)(?:@(\d+))?\[(.+)\]", key)
        if whole is None:
            raise ValueError(f"`{key}` is not a site structure")
        branches = []
        for text in whole[3].split("|"):
            branch = re.fullmatch(r"r(\d+):p([\d.e+-]+):(\w+)(:bias)?", text)
            if branch is None:
                raise ValueError(f"`{text}` is not a branch of a site structure")
            rank, dropout, compute, bias = branch.groups()
            branches.append(Branch(int(rank), float(dropout), compute, bias is not None))
        return Structure(whole[1], tuple(branches), None if whole[2] is None else int(whole[2]))


def compute_dtype(compute: str, activation: torch.dtype) -> torch.dtype:
    """Return the dtype that `compute` names, given that of the activations."""
    return activation if compute == ACTIVATION else getattr(torch, compute)
