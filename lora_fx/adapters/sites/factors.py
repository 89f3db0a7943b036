"""What an adapter keeps at a site, and how its branch computes there."""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from lora_fx.adapters.sites.sampler import PRIORS, Sampler

Holder = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Compression:
    """What VeLoRA keeps of an input: `graph/velora.py`. `init` is PEFT's `init_type`."""

    groups: int
    scale: float
    init: str


@dataclass(frozen=True)
class Arithmetic:
    """How one adapter's branch computes here.

    `scaling` is the number that multiplies B A x; `alpha` and `rslora` say where it came from.
    `blocks` are the numbers of blocks on the diagonals of A and B, `drawn` of how many samples
    MonteCLoRA's noise is in training, and its scale. `invoked`: it acts from its invocation on.
    """

    alpha: float
    scaling: float
    rslora: bool
    dropout: float
    compute: str
    blocks: tuple[int, int] = (1, 1)
    compression: Compression | None = None
    drawn: tuple[int, float] = (0, 0.0)
    invoked: bool = False

    def times(self, factor: float) -> "Arithmetic":
        """Return the same with another scaling."""
        return self if factor == 1 else replace(self, scaling=self.scaling * factor)

    @property
    def kept(self) -> tuple[int, float]:
        """How many groups of an input are kept for the gradient of A, 0 if all of it, and how."""
        kept = self.compression
        return (0, 1.0) if kept is None else (kept.groups, kept.scale)


class Vector(nn.Module):
    """Holds a `weight` that is trained: DoRA's magnitudes (out,), or KaSA's diagonal (r,).

    A convolution's magnitudes are (1, out, 1…).
    """

    def __init__(self, weight: Tensor, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)


class Direction(nn.Module):
    """Holds VeLoRA's direction `weight` (width,), which is zero until there is an input."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)


@dataclass(frozen=True)
class Held:
    """Where a tensor of a branch is: in a module, by name.

    `by_row` if it has one row for each output, `learning` if it is of training alone.
    """

    module: nn.Module
    name: str
    by_row: bool = False
    turned: bool = False
    learning: bool = False

    def tensor(self, module: nn.Module, rows: slice | None) -> Tensor:
        """Return it, or some of its rows, read from the module that is given."""
        tensor = getattr(module, self.name)
        if self.turned:
            return tensor.t()
        return tensor if rows is None or not self.by_row else tensor[rows]


@dataclass(frozen=True)
class Factors:
    """The modules that hold one branch's A (r, in) and B (out, r), and what else it has.

    Of a convolution they are convolutions too: A (r, in, k…), B (out, r / groups, 1…).
    Of a `tied` branch they are those of the embedding whose weight the layer shares: there its
    delta is the transposed one, A is Bᵀ and B is Aᵀ.
    """

    A: Holder
    B: Holder
    magnitude: Vector | None = None
    tied: bool = False
    direction: Direction | None = None
    diagonal: Vector | None = None
    sampler: Sampler | None = None

    def tensors(self, training: bool = False, rows: slice | None = None) -> list[Tensor]:
        """Return A, B and, of those that there are, B's bias, magnitude, v, d and priors.

        v and priors are of training alone. What has a row for each output, of these `rows` alone.
        """
        held = (one for one in self.held if training or not one.learning)
        return [one.tensor(one.module, rows) for one in held]

    @cached_property
    def held(self) -> tuple[Held, ...]:
        """Where those tensors are."""
        if self.tied:
            return Held(self.B, "weight", turned=True), Held(self.A, "weight", turned=True)
        found = [Held(self.A, "weight"), Held(self.B, "weight", by_row=True)]
        if self.has_bias:
            found.append(Held(self.B, "bias", by_row=True))
        if self.magnitude is not None:
            found.append(Held(self.magnitude, "weight", by_row=True))
        if self.direction is not None:
            found.append(Held(self.direction, "weight", learning=True))
        if self.diagonal is not None:
            found.append(Held(self.diagonal, "weight"))
        if self.sampler is not None:
            found += [Held(self.sampler, name, learning=True) for name in PRIORS]
        return tuple(found)

    @cached_property
    def form(self) -> str:
        """What there is of those tensors, in a text."""
        held = self.held
        return repr([(one.name, one.by_row, one.turned, one.learning) for one in held])

    def product(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r), with the diagonal in B, as they lie in memory."""
        A, B, *_ = self.tensors()
        return A, B if self.diagonal is None else B * self.diagonal.weight

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.A.weight.shape[0]

    @property
    def has_bias(self) -> bool:
        """Whether B has a bias."""
        return self.B.bias is not None


@dataclass(frozen=True)
class Change:
    """What `adapter` took out of a base weight: scaling * B A of these factors, which are frozen.

    `base` is the fingerprint of the weight before that. What was `removed` the adapter does not
    start with (KaSA). Where the weight was `replaced`, by a quantised one, these factors are the
    best of their rank for what it has lost.
    """

    adapter: str
    factors: Factors
    arithmetic: Arithmetic
    base: str
    replaced: bool = False
    removed: bool = False
