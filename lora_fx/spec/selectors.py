"""Which modules a rule is about, as written."""

from dataclasses import dataclass
from typing import Literal

from lora_fx.diagnostics import Span
from lora_fx.spec.expressions import Expr, quote
from lora_fx.spec.one_line import one_line


@dataclass(frozen=True)
class Range:
    """Layers `start` up to but not including `end`; None is the first, or the last one."""

    start: int | None
    end: int | None
    span: Span

    @property
    def last(self) -> int:
        """The last layer that the range certainly needs."""
        return (self.start or 0) if self.end is None else self.end - 1

    def __str__(self) -> str:
        return f"{'' if self.start is None else self.start}..{'' if self.end is None else self.end}"


@dataclass(frozen=True)
class Atom:
    """One pattern: what it is matched with, and against what, is its kind.

    `name`: a module's dotted name, or its end. `glob`: the whole name. `regex`: a full match of
    it. `class`: the class's name. `linear`: every linear layer but the output head. `parameter`: a
    glob over the whole dotted name of a parameter.
    """

    kind: Literal["name", "glob", "regex", "class", "linear", "parameter"]
    pattern: str
    span: Span

    def __str__(self) -> str:
        if self.kind in ("name", "linear"):
            return self.pattern
        return quote(self.pattern) if self.kind == "glob" else f"{self.kind} {quote(self.pattern)}"


@dataclass(frozen=True)
class Selector:
    """What `atoms` match together, narrowed by all clauses.

    `layers` are half-open ranges of the stack called `stack`, or of the only one.
    """

    atoms: tuple[Atom, ...]
    excludes: tuple[Atom, ...]
    layers: tuple[Range, ...] | None
    stack: str | None
    conditions: tuple[Expr, ...]
    span: Span

    @property
    def text(self) -> str:
        """The selector as written, on one line."""
        return one_line(self.span.text)
