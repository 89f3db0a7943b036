"""Texts, and places in them."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """A text and the name that diagnostics call it by."""

    name: str
    text: str

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return (0, *(i + 1 for i, character in enumerate(self.text) if character == "\n"))

    def line_number(self, offset: int) -> int:
        """Return the 1-based line that holds the offset."""
        return bisect_right(self._starts, offset)

    def line_start(self, number: int) -> int:
        """Return the offset at which a 1-based line begins."""
        return self._starts[number - 1]

    def line(self, number: int) -> str:
        """Return the text of a 1-based line, without its end."""
        start = self.line_start(number)
        end = self._starts[number] - 1 if number < len(self._starts) else len(self.text)
        return self.text[start:end].removesuffix("\r")


@dataclass(frozen=True)
class Span:
    """The part `text[start:end]` of a source."""

    source: Source
    start: int
    end: int

    def __repr__(self) -> str:
        return f"Span({self.source.name}:{self.line}:{self.column})"

    @property
    def line(self) -> int:
        """The 1-based line of the first character."""
        return self.source.line_number(self.start)

    @property
    def column(self) -> int:
        """The 1-based column, in characters, of the first character."""
        return self.start - self.source.line_start(self.line) + 1

    @property
    def last_line(self) -> int:
        """The 1-based line of the last character."""
        return self.source.line_number(max(self.start, self.end - 1))

    @property
    def end_column(self) -> int:
        """The 1-based column, on the last line, behind the last character."""
        return self.end - self.source.line_start(self.last_line) + 1

    @property
    def text(self) -> str:
        """The characters themselves."""
        return self.source.text[self.start : self.end]
