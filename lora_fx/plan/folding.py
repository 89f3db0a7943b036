"""Write dotted names that differ only in numbers as one: `model.layers.{0..7,12}.q_proj`.

Both ends of a range are included. Where there are several numbers, as in layers of experts, a
folded name stands for all combinations.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

_MOST_NUMBERS = 10_000

Segment = str | tuple[int, ...]


@dataclass(frozen=True)
class Fold:
    """The names, and their segments: a text, or the numbers that stand in its place."""

    segments: tuple[Segment, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(_show, self.segments))

    @property
    def stack(self) -> str:
        """What stands before the first number; empty if there is none."""
        return ".".join(map(_show, self.segments[: self._first])) if self._first else ""

    @property
    def layers(self) -> tuple[int, ...]:
        """The first numbers; empty if there are none."""
        segment = self.segments[self._first] if self._first else ()
        return segment if isinstance(segment, tuple) else ()

    @property
    def rest(self) -> str:
        """What stands behind the first number; all of it if there is none."""
        start = self._first + 1 if self._first else 0
        return ".".join(map(_show, self.segments[start:]))

    @property
    def _first(self) -> int:
        numbers = (i for i, segment in enumerate(self.segments) if isinstance(segment, tuple))
        return next(numbers, 0)


def fold(names: Iterable[str]) -> list[Fold]:
    """Return names folded, in the order of the first of each."""
    folds = [Fold(tuple(map(_segment, name.split("."))), (name,)) for name in names]
    depth = max((len(one.segments) for one in folds), default=0)
    for position in reversed(range(depth)):
        alike: dict[tuple[object, ...], list[Fold]] = {}
        for one in folds:
            alike.setdefault(_others(one, position), []).append(one)
        folds = [_joined(group, position) for group in alike.values()]
    return folds


def unfold(text: str) -> list[str]:
    """Return the names that a folded name stands for. Raises ValueError for what is none."""
    names = [""]
    for part in re.split(r"(\{[^{}]*\})", text):
        choices = [str(n) for n in _numbers(part[1:-1])] if part[:1] == "{" else [part]
        names = [name + choice for name in names for choice in choices]
    return names


def _numbers(text: str) -> Iterator[int]:
    for run in text.split(","):
        start, dots, end = run.partition("..")
        numbers = range(int(start), int(end if dots else start) + 1)
        if len(numbers) > _MOST_NUMBERS:
            raise ValueError(f"`{run}` is a longer range than any model has layers")
        yield from numbers


def _segment(text: str) -> Segment:
    return (int(text),) if text.isdecimal() and str(int(text)) == text else text


def _others(one: Fold, position: int) -> tuple[object, ...]:
    """Return what must be equal for two names to differ only in the number at a position."""
    if position < len(one.segments) and isinstance(one.segments[position], tuple):
        return (*one.segments[:position], None, *one.segments[position + 1 :])
    return one.segments


def _joined(group: Sequence[Fold], position: int) -> Fold:
    first, *others = group
    if not others:
        return first
    numbers = sorted({n for one in group for n in one.segments[position]})
    names = tuple(name for one in group for name in one.names)
    rest = first.segments[position + 1 :]
    return Fold((*first.segments[:position], tuple(numbers), *rest), names)  # type: ignore[arg-type]


def _show(segment: Segment) -> str:
    if isinstance(segment, str):
        return segment
    return f"{{{ranges(segment)}}}" if len(segment) > 1 else ranges(segment)


def ranges(numbers: Iterable[int], comma: str = ",") -> str:
    """Return ascending numbers as ranges: `0..7,12`, both ends included."""
    runs = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(f"{members[0]}..{members[-1]}" if len(members) > 1 else f"{members[0]}")
    return comma.join(runs)


def numberless(name: str) -> str:
    """Return a dotted name with `*` in the place of its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
