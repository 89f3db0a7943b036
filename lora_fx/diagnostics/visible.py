"""What a terminal shows of a text, and nothing that it would obey."""

import unicodedata
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from textwrap import wrap

from rich.cells import cell_len

_LEAST_ROOM = 24
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    """Return the text with tabs as four blanks and every control character as a box."""
    return "".join(_shown(character) for character in text)


def wrapped(text: str, room: int | None) -> list[str]:
    """Return a visible text in lines of so many cells, or in one if there is no limit."""
    if room is None:
        return [text]
    return wrap(text, max(room, _LEAST_ROOM), break_long_words=False, break_on_hyphens=False)


def _shown(character: str) -> str:
    if character == "\t":
        return "    "
    return "\ufffd" if unicodedata.category(character) in _UNSEEN else character


@dataclass(frozen=True)
class Window:
    """The part of a line that is shown; an ellipsis stands for what is left out on either side."""

    text: str
    first: int
    cells: tuple[int, ...]

    def cell(self, column: int) -> int:
        """Return the terminal cell of a 0-based column, the nearest one if it is not shown."""
        return self.cells[min(max(column - self.first, 0), len(self.cells) - 1)]


class Line:
    """A line of a source, measured in the cells of a terminal."""

    def __init__(self, text: str) -> None:
        self.indent = len(text) - len(text.lstrip())
        self._characters = [_shown(character) for character in text]
        self._edges = [0, *accumulate(cell_len(shown) for shown in self._characters)]

    def __len__(self) -> int:
        return len(self._characters)

    def width(self, start: int, end: int) -> int:
        """Return how many cells the columns from `start` to before `end` take."""
        last = len(self._characters)
        return self._edges[min(end, last)] - self._edges[min(start, last)]

    def window(self, column: int, room: int) -> Window:
        """Return the whole line if it has room, else as much as has, with the column in it."""
        last, total = len(self._characters), self._edges[-1]
        if total <= room:
            return Window("".join(self._characters), 0, tuple(self._edges))
        room -= 2  # ellipses
        from_cell = max(0, self._edges[min(column, last)] - room // 4)
        first = bisect_left(self._edges, from_cell)
        end = max(bisect_right(self._edges, self._edges[first] + room) - 1, first + 1)
        before, after = "…" * (first > 0), "…" * (end < last)
        text = f"{before}{''.join(self._characters[first:end])}{after}"
        shift = len(before) - self._edges[first]
        return Window(text, first, tuple(edge + shift for edge in self._edges[first : end + 1]))


@lru_cache(maxsize=16)
def measured(text: str) -> Line:
    """Return a line, measured once for all the mistakes in it."""
    return Line(text)
