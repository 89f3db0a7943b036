"""Which modules a rule is about, as written."""

import re
from dataclasses import dataclass
from typing import Literal

from lora_fx.diagnostics import Span
from lora_fx.spec.expressions import Expr

_MOST_WILDCARDS = 12


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
    """One pattern: a name, a glob over the whole dotted name, or `linear`."""

    kind: Literal["name", "glob", "linear"]
    pattern: str
    span: Span

    def __str__(self) -> str:
        return f'"{self.pattern}"' if self.kind == "glob" else self.pattern


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
        return " ".join(self.span.text.split())


class BadGlob(ValueError):
    """A glob that cannot be read; the text says why."""


_TOKEN = re.compile(
    r"""(?P<deep>(?<![^.{,])\*\*\.)        # any number of segments, none included
    | (?P<tail>(?<![^.{,])\*\*(?![^},]))   # one segment or more, at the end
    | (?P<bad>\*\*)
    | (?P<segment>(?<![^.{,])\*(?![^.},]))  # one whole segment
    | (?P<part>\*)                         # a part of one segment
    | (?P<open>\{) | (?P<close>\}) | (?P<comma>,) | (?P<text>[^*{},]+)""",
    re.VERBOSE,
)
_REGEX = {
    "deep": r"(?:[^.]+\.)*",
    "tail": ".+",
    "segment": "[^.]+",
    "part": "[^.]*",
    "open": "(?:",
    "close": ")",
    "comma": "|",
}


def glob_to_regex(pattern: str) -> re.Pattern[str]:
    """Translate a glob over dotted names into a regex for `fullmatch`.

    `*` matches within one segment, `**` any number of segments (at least one at the end),
    `{a,b}` either. Raises BadGlob.
    """
    if not pattern:
        raise BadGlob("an empty pattern matches nothing")
    if pattern.count("*") > _MOST_WILDCARDS:
        raise BadGlob(f"a pattern may hold {_MOST_WILDCARDS} asterisks at most")
    regex, depth = [], 0
    for token in _TOKEN.finditer(pattern):
        kind = str(token.lastgroup)
        depth += {"open": 1, "close": -1}.get(kind, 0)
        if depth < 0:
            raise BadGlob("`}` has no `{` before it")
        if kind == "bad":
            raise BadGlob("`**` stands for whole segments, between dots")
        literal = kind == "text" or (kind == "comma" and not depth)
        regex.append(re.escape(token[0]) if literal else _REGEX[kind])
    if depth:
        raise BadGlob("`{` is never closed")
    return re.compile("".join(regex))
