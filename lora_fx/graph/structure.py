"""The structure key of a site: all that the rewrite needs to know, nothing that names a module."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from lora_fx.graph.convolution import Window
from lora_fx.graph.packing import Packing

ACTIVATION = "activation"
_WHOLE = re.compile(
    r"(\w+)(?:@(\d+))?(?:\*([\d.e+-]+))?(?:\((.+?)\))?(?:<(.+)>)?(?:~(\d+))?"
    r"(?:\^(\d+)/([\d.e+-]+))?\[(.+)\]"
)
_BRANCH = re.compile(
    r"r(\d+):p([\d.e+-]+):(\w+)(:bias)?(:magnitude)?(:diagonal)?(?::(\d+)x(\d+))?"
    r"(?::g(\d+)\*([\d.e+-]+))?(?::n(\d+)\*([\d.e+-]+))?(?::([+-])s(\d+))?(?::i(\d+))?(?:\*(\d+))?"
)


@dataclass(frozen=True)
class Branch:
    """One adapter's low-rank branch at a site.

    `rank` is the inner dimension; `dropout` the probability applied to the branch's input (0 in
    evaluation); `compute` the dtype of its arithmetic, or `activation` for that of its input;
    `bias` says that B has a bias, `magnitude` that the branch is DoRA's, `diagonal` that there is
    KaSA's between B and A. `blocks` are the numbers
    of blocks that A and B consist of, on a diagonal; more than one are stored below each other.
    `groups`, if not 0, is how many groups of its input VeLoRA projects, and `scale` its scale;
    `samples`, if not 0, how many MonteCLoRA draws of A, and `noise` its scale.
    In a mixed batch `column` is where the samples' shares of the branch stand; `rest` says that it
    takes part in each sample by what that share is less than 1. A branch that acts from its
    invocation on has in `invoked` the column that says how many tokens that is.
    `many`, if not 0, is how many adapters alike follow each other there, in columns and scalings
    too: their A are (many, r, in), and B (many, out, r). It is the last branch of its site.
    """

    rank: int
    dropout: float = 0.0
    compute: str = ACTIVATION
    bias: bool = False
    magnitude: bool = False
    blocks: tuple[int, int] = (1, 1)
    groups: int = 0
    scale: float = 1.0
    diagonal: bool = False
    samples: int = 0
    noise: float = 0.0
    column: int | None = None
    rest: bool = False
    invoked: int | None = None
    many: int = 0

    def evaluated(self) -> "Branch":
        """Return the branch as it is in evaluation: nothing is dropped, projected or drawn."""
        return replace(self, dropout=0.0, groups=0, scale=1.0, samples=0, noise=0.0)

    def __str__(self) -> str:
        flags = {"bias": self.bias, "magnitude": self.magnitude, "diagonal": self.diagonal}
        more = "".join(f":{name}" for name, is_set in flags.items() if is_set)
        if self.blocks != (1, 1):
            more += f":{self.blocks[0]}x{self.blocks[1]}"
        if self.groups:
            more += f":g{self.groups}*{self.scale!r}"
        if self.samples:
            more += f":n{self.samples}*{self.noise!r}"
        if self.column is not None:
            more += f":{'-' if self.rest else '+'}s{self.column}"
        if self.invoked is not None:
            more += f":i{self.invoked}"
        if self.many:
            more += f"*{self.many}"
        return f"r{self.rank}:p{self.dropout!r}:{self.compute}{more}"


@dataclass(frozen=True)
class Structure:
    """What `lora_fx::site` computes; equal for sites that may share one compiled graph.

    Its text is the `structure` argument of the op, and of `merge`, which tells `transposed` layers
    from `linear` ones. `kind` is `linear`, `embedding` or `conv`, or for matrices in stacks
    `batched` or `grouped`: each has its own rows, or they follow each other. `padding` is an
    embedding's row that has no gradient, `factor` what it multiplies its output by, `window` a
    convolution's. `packing` is that of a weight in 4 or 8 bits, where a branch needs the weight. In
    a mixed batch no sample has a share in more than `terms` branches; 0 if that is not known. Where
    each token is routed, `arrow` is among how many branches, at most, and at which temperature.
    Values that may change without a recompile (weights, scalings) are tensors and have no place
    here.
    """

    kind: str
    branches: tuple[Branch, ...]
    padding: int | None = None
    factor: float = 1.0
    window: Window | None = None
    packing: Packing | None = None
    terms: int = 0
    arrow: tuple[int, float] | None = None

    def __str__(self) -> str:
        padding = "" if self.padding is None else f"@{self.padding}"
        factor = "" if self.factor == 1 else f"*{self.factor!r}"
        window = "" if self.window is None else f"({self.window})"
        packing = "" if self.packing is None else f"<{self.packing}>"
        terms = f"~{self.terms}" if self.terms else ""
        arrow = "" if self.arrow is None else f"^{self.arrow[0]}/{self.arrow[1]!r}"
        branches = "|".join(map(str, self.branches))
        return f"{self.kind}{padding}{factor}{window}{packing}{terms}{arrow}[{branches}]"

    def params(self, tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Deal out the op's `params` to the branches: A, B, and what there is of these, or None.

        B's bias, DoRA's magnitude, VeLoRA's direction, KaSA's diagonal, MonteCLoRA's priors, which
        are two.
        """
        left = iter(tensors)
        return [
            (
                next(left),
                next(left),
                next(left) if branch.bias else None,
                next(left) if branch.magnitude else None,
                next(left) if branch.groups else None,
                next(left) if branch.diagonal else None,
                (next(left), next(left)) if branch.samples else None,
            )
            for branch in self.branches
        ]

    def weight(self, base: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Deal out the op's `base`: what the weight consists of, and the bias if there is one."""
        tensors = 1 if self.packing is None else self.packing.tensors
        return list(base[:tensors]), list(base[tensors:])

    @property
    def is_stack(self) -> bool:
        """Whether there is one more dimension in front, of matrices."""
        return self.kind in ("batched", "grouped")

    @property
    def transposed(self) -> bool:
        """Whether the weight is (in, out): of an embedding, whose inputs are its rows, too."""
        return self.kind in ("transposed", "embedding")

    @staticmethod
    @cache
    def parse(key: str) -> "Structure":
        """Read a key back; `Structure.parse(str(s)) == s`. Raises ValueError for any other text."""
        whole = _WHOLE.fullmatch(key)
        if whole is None:
            raise ValueError(f"`{key}` is not a site structure")
        branches = []
        for text in whole[9].split("|"):
            branch = _BRANCH.fullmatch(text)
            if branch is None:
                raise ValueError(f"`{text}` is not a branch of a site structure")
            rank, dropout, compute, bias, magnitude, diagonal, a, b, *kept = branch.groups()
            groups, scale, samples, noise, sign, column, invoked, many = kept
            flags = bias is not None, magnitude is not None
            blocks = int(a or 1), int(b or 1)
            more = int(groups or 0), float(scale or 1), diagonal is not None
            more = *more, int(samples or 0), float(noise or 0)
            more = *more, None if column is None else int(column), sign == "-"
            more = *more, None if invoked is None else int(invoked), int(many or 0)
            branches.append(Branch(int(rank), float(dropout), compute, *flags, blocks, *more))
        padding = None if whole[2] is None else int(whole[2])
        window = None if whole[4] is None else Window.parse(whole[4])
        packing = None if whole[5] is None else Packing.parse(whole[5])
        of_layer = padding, float(whole[3] or 1), window, packing
        arrow = None if whole[7] is None else (int(whole[7]), float(whole[8]))
        return Structure(whole[1], tuple(branches), *of_layer, int(whole[6] or 0), arrow)


def keys(
    kind: str,
    branches: tuple[Branch, ...],
    *layer: Any,
    arrow: tuple[int, float] | None = None,
) -> tuple[str, str]:
    """Return the keys of these branches in training and in evaluation; `layer` as in `Structure`.

    Modules that are alike share them.
    """
    return _keys(kind, branches, layer, arrow)


@lru_cache(64)
def _keys(
    kind: str, training: tuple[Branch, ...], layer: tuple[Any, ...], arrow: tuple[int, float] | None
) -> tuple[str, str]:
    evaluation = tuple(branch.evaluated() for branch in training)
    both = (Structure(kind, branches, *layer, arrow=arrow) for branches in (training, evaluation))
    in_training, outside = map(str, both)
    return in_training, outside


def compute_dtype(compute: str, activation: torch.dtype) -> torch.dtype:
    """Return the dtype that `compute` names, given that of the activations."""
    return activation if compute == ACTIVATION else getattr(torch, compute)
