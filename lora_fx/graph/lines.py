"""Tensors whose elements are linear in their own indices, and the regions that they bound.

    Line(steps, start)      x[i] = start + Σ_d steps[d] · i[d]            integers
    Region(lines)           x[i] = (line[i] ≥ 0 for every line)           booleans

Sizes may be symbols. What is said to hold, holds for all their values; nothing is guarded on (so
these are never compared with `==`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = Any  # an int, or a torch.SymInt


class Unknown(Exception):
    """A value is no line and no region, as far as can be said."""


@dataclass(frozen=True, eq=False)
class Line:
    """Integers that grow by `steps[d]` along dimension d, from `start` at index 0."""

    steps: tuple[int, ...]
    start: Size

    def __add__(self, other: "Line") -> "Line":
        pairs = zip(*(_padded(line, _rank(self, other)) for line in (self, other)), strict=True)
        return Line(tuple(a + b for a, b in pairs), self.start + other.start)

    def __sub__(self, other: "Line") -> "Line":
        return self + other.times(-1)

    def times(self, factor: int) -> "Line":
        """Return every element times a number."""
        return Line(tuple(step * factor for step in self.steps), self.start * factor)

    @property
    def constant(self) -> Size:
        """The one value of all elements; raises Unknown if there are several."""
        if any(self.steps):
            raise Unknown
        return self.start

    def at_least(self, bound: int, shape: Sequence[Size]) -> bool:
        """Whether every element of a tensor of this shape is known to be `bound` or more."""
        falls = (step * (n - 1) for step, n in zip(self.steps, shape, strict=True) if step < 0)
        return statically_known_true(self.start + sum(falls) >= bound)

    def fitted(self, shape: Sequence[Size]) -> "Line":
        """Return the same elements as one of this shape: no steps where there is one index."""
        known = zip(_padded(self, len(shape)), shape, strict=True)
        return Line(tuple(0 if _is(n, 1) else step for step, n in known), self.start)


@dataclass(frozen=True, eq=False)
class Region:
    """Booleans that are true where every line is zero or more: everywhere, if there is none."""

    lines: tuple[Line, ...] = ()

    @classmethod
    def of(cls, truth: bool) -> "Region":
        """Return the region that is true everywhere, or nowhere."""
        return EVERYWHERE if truth else NOWHERE

    def __and__(self, other: "Region") -> "Region":
        return Region((*self.lines, *other.lines))

    def __invert__(self) -> "Region":
        if not self.lines:
            return NOWHERE
        line, *more = self.lines
        if more:
            raise Unknown
        return Region((line.times(-1) + Line((), -1),))

    def fitted(self, shape: Sequence[Size]) -> "Region":
        """Return it without the lines that bound nothing in a tensor of this shape."""
        lines = (line.fitted(shape) for line in self.lines)
        return Region(tuple(line for line in lines if not line.at_least(0, shape)))


EVERYWHERE = Region()
NOWHERE = Region((Line((), -1),))
Value = Line | Region


def as_line(value: Value) -> Line:
    """Return booleans as 0 and 1; raises Unknown where they differ."""
    if isinstance(value, Line):
        return value
    return Line((), int(truth(value)))


def as_region(value: Value) -> Region:
    """Return numbers as what is not zero; raises Unknown where that is not all or nothing."""
    if isinstance(value, Region):
        return value
    if _is(value.constant, 0):
        return NOWHERE
    if statically_known_true(value.constant != 0):
        return EVERYWHERE
    raise Unknown


def truth(region: Region) -> bool:
    """Return whether it is true everywhere or nowhere; raises Unknown if neither is known."""
    if not region.lines:
        return True
    if any(not any(line.steps) and statically_known_true(line.start < 0) for line in region.lines):
        return False
    raise Unknown


def _is(size: Size, value: int) -> bool:
    return statically_known_true(size == value)


def _rank(*lines: Line) -> int:
    return max(len(line.steps) for line in lines)


def _padded(line: Line, rank: int) -> Iterator[int]:
    """Yield the steps with those of the dimensions that broadcasting puts before them."""
    yield from (0,) * (rank - len(line.steps))
    yield from line.steps
