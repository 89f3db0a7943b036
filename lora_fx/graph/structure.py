"""The structure key of a site: all that the rewrite needs to know, nothing that names a module."""

import re
from dataclasses import dataclass
from functools import cache

import torch

ACTIVATION = "activation"


@dataclass(frozen=True)
class Branch:
    """One adapter's low-rank branch at a site.

    `rank` is the inner dimension; `dropout` the probability applied to the branch's input (0 in
    evaluation); `compute` the dtype of its arithmetic, or `activation` for that of its input.
    """

    rank: int
    dropout: float = 0.0
    compute: str = ACTIVATION

    def __str__(self) -> str:
        return f"r{self.rank}:p{self.dropout!r}:{self.compute}"


@dataclass(frozen=True)
class Structure:
    """What `lora_fx::site` computes; equal for sites that may share one compiled graph.

    Its text is the `structure` argument of the op. Values that may change without a recompile
    (weights, scalings) are tensors and have no place here.
    """

    kind: str
    branches: tuple[Branch, ...]

    def __str__(self) -> str:
        return f"{self.kind}[{'|'.join(map(str, self.branches))}]"

    @staticmethod
    @cache
    def parse(key: str) -> "Structure":
        """Read a key back; `Structure.parse(str(s)) == s`. Raises ValueError for any other text."""
        whole = re.fullmatch(r"(\w+)\[(.+)\]", key)
        if whole is None:
            raise ValueError(f"`{key}` is not a site structure")
        branches = []
        for text in whole[2].split("|"):
            branch = re.fullmatch(r"r(\d+):p([\d.e+-]+):(\w+)", text)
            if branch is None:
                raise ValueError(f"`{text}` is not a branch of a site structure")
            branches.append(Branch(int(branch[1]), float(branch[2]), branch[3]))
        return Structure(whole[1], tuple(branches))


def compute_dtype(compute: str, activation: torch.dtype) -> torch.dtype:
    """Return the dtype that `compute` names, given that of the activations."""
    return activation if compute == ACTIVATION else getattr(torch, compute)
