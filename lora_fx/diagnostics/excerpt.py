"""The lines of one source that spans point at, with their marks.

A span of several lines is a bracket at the left:

    3 |   adapter sql {
      |  _____________-
    4 | |   rank = 8
    5 | | }
      | |_- the block that this is about
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rich.text import Text

from lora_fx.diagnostics.source import Span
from lora_fx.diagnostics.underline import Mark, shown, underline
from lora_fx.diagnostics.visible import Line, Window, measured

FRAME = "bold blue"
_SHOWN_WHOLE = 6
_WIDTH = 120
_LEAST_ROOM = 40


@dataclass(frozen=True)
class Pointer:
    """A span to be marked, with its label, by carets if it is the primary one."""

    span: Span
    label: str
    primary: bool
    style: str


@dataclass(frozen=True)
class _Place:
    """Where a pointer touches a line: all of it, or one end of it; columns from 0."""

    pointer: Pointer
    part: Literal["all", "begin", "end"]
    start: int
    end: int


class Excerpt:
    """The rows of one source, as wide as `width` where that is possible.

    Without a width lines are cut to a window all the same, and labels are as long as they are.
    """

    def __init__(self, pointers: Sequence[Pointer], pad: str, width: int | None) -> None:
        self._source = pointers[0].span.source
        self._pointers = pointers
        self._pad = pad
        self._brackets = _brackets(pointers)
        self._gutter = 2 * len(set(self._brackets.values()))
        self._room = max((width or _WIDTH) - len(pad) - 3 - self._gutter, _LEAST_ROOM)
        self._room_for_labels = self._room if width else None
        self._open: set[Pointer] = set()

    def rows(self) -> Iterator[Text]:
        """Yield each row, without its line break."""
        numbers = _numbers(self._pointers)
        for before, number in pairwise([numbers[0] - 1, *numbers]):
            if number > before + 1:
                yield self._row("...", self._bars())
            yield from self._line(number)

    def _line(self, number: int) -> Iterator[Text]:
        line = measured(self._source.line(number))
        groups = _groups(line, _places(self._pointers, number), self._room)
        for places in groups or [[]]:
            window = line.window(places[0].start if places else 0, self._room)
            begun = [p.pointer for p in places if p.part == "begin" and _opens(p, line, window)]
            gutter = self._bars()
            for pointer in begun:
                gutter[self._brackets[pointer]] = ("/", pointer.style)
            yield self._row(f"{number:>{len(self._pad)}} |", gutter, Text(window.text))
            self._open.update(begun)
            yield from self._marks(places, window)

    def _marks(self, places: Sequence[_Place], window: Window) -> Iterator[Text]:
        if alls := [_mark(place, window) for place in places if place.part == "all"]:
            for row in underline(alls, self._room_for_labels):
                yield self._row(f"{self._pad} |", self._bars(), row)
        for place in places:
            opens = place.part == "begin" and place.pointer not in self._open
            if opens or place.part == "end":
                yield self._corner(place, window)

    def _corner(self, place: _Place, window: Window) -> Text:
        """Return the row that leads from the bracket to one end of its span."""
        pointer, at = place.pointer, self._brackets[place.pointer]
        gutter = self._bars()
        gutter[at] = ("|" if place.part == "end" else " ", pointer.style)
        for cell in range(at + 1, self._gutter):
            gutter[cell] = ("_", pointer.style)
        row = Text("_" * window.cell(place.start) + "^-"[not pointer.primary], pointer.style)
        if place.part == "begin":
            self._open.add(pointer)
        else:
            self._open.discard(pointer)
            if pointer.label:
                row.append(f" {shown(pointer.label)}")
        return self._row(f"{self._pad} |", gutter, row)

    def _bars(self) -> dict[int, tuple[str, str]]:
        return {self._brackets[pointer]: ("|", pointer.style) for pointer in self._open}

    def _row(self, head: str, gutter: dict[int, tuple[str, str]], rest: Text | None = None) -> Text:
        row = Text(f"{head:<{len(self._pad) + 2}} ", FRAME)
        for cell in range(self._gutter):
            row.append(*gutter.get(cell, (" ", "")))
        row = Text.assemble(row, rest or "")
        row.rstrip()
        return row


def _brackets(pointers: Sequence[Pointer]) -> dict[Pointer, int]:
    """Return the cell of each bracket in the gutter; those that overlap stand side by side."""
    tall = [pointer for pointer in pointers if pointer.span.line < pointer.span.last_line]
    tall.sort(key=lambda pointer: (pointer.span.line, -pointer.span.last_line))
    cells: dict[Pointer, int] = {}
    for pointer in tall:
        taken = {c for p, c in cells.items() if p.span.last_line >= pointer.span.line}
        cells[pointer] = next(c for c in range(0, 2 * len(tall), 2) if c not in taken)
    return cells


def _numbers(pointers: Sequence[Pointer]) -> list[int]:
    """Choose the lines to show: a tall span's ends, all of it if it is short, gaps of one line."""
    numbers: set[int] = set()
    for span in (pointer.span for pointer in pointers):
        first, last = span.line, span.last_line
        short = last - first < _SHOWN_WHOLE
        numbers.update(range(first, last + 1) if short else (first, first + 1, last - 1, last))
    numbers.update(n + 1 for n in list(numbers) if n + 2 in numbers)
    return sorted(numbers)


def _places(pointers: Sequence[Pointer], number: int) -> list[_Place]:
    places = []
    for pointer in pointers:
        span = pointer.span
        start, end = span.column - 1, span.end_column - 1
        if span.line == span.last_line == number:
            places.append(_Place(pointer, "all", start, max(end, start + 1)))
        elif span.line == number:
            places.append(_Place(pointer, "begin", start, start + 1))
        elif span.last_line == number:
            last = max(min(end, len(span.source.line(number))) - 1, 0)
            places.append(_Place(pointer, "end", last, last + 1))
    return sorted(places, key=lambda place: place.start)


def _groups(line: Line, places: Sequence[_Place], room: int) -> list[list[_Place]]:
    """Return the places of a line, apart where one window cannot show them together."""
    groups: list[list[_Place]] = []
    whole = line.width(0, len(line)) <= room
    for place in places:
        if groups and (whole or line.width(groups[-1][0].start, place.end) <= room * 3 // 4):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _opens(place: _Place, line: Line, window: Window) -> bool:
    """Whether a tall span begins where its line does, so that the bracket needs no corner."""
    return window.first == 0 and place.start <= line.indent


def _mark(place: _Place, window: Window) -> Mark:
    start = window.cell(place.start)
    end = max(window.cell(place.end), start + 1)
    pointer = place.pointer
    return Mark(start, end, pointer.label, pointer.primary, pointer.style)
