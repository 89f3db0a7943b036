"""What is wrong, where, and what to do about it."""

import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

Severity = Literal["error", "warning", "note"]

_STYLE: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold green"}
_FRAME = "bold blue"
_WIDTH = 120


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
    def text(self) -> str:
        """The characters themselves."""
        return self.source.text[self.start : self.end]


@dataclass(frozen=True)
class Diagnostic:
    """One thing to tell the user: a lower-case sentence, where it holds, and one action.

    `label` stands at the span and gives the actual numbers; `secondary` points at other places
    that take part. `code` is a slug that never changes.
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    secondary: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    severity: Severity = "error"


class LoraFxError(Exception):
    """Everything that is wrong, at once; `str()` shows it as rustc would."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        return "\n" + render(self.diagnostics)


def render(diagnostics: Iterable[Diagnostic], width: int = _WIDTH, color: bool = False) -> str:
    """Return the diagnostics as text, a blank line between two; `color` adds ANSI codes."""
    texts = [to_rich(diagnostic, width) for diagnostic in diagnostics]
    joined = Text("\n\n").join(texts)
    if not color:
        return joined.plain
    console = Console(width=max(width, 20), force_terminal=True, no_color=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(joined, end="")
    return capture.get()


def to_rich(diagnostic: Diagnostic, width: int = _WIDTH) -> Text:
    """Return one diagnostic as styled text; source lines wider than `width` are cut to a window."""
    style = _STYLE[diagnostic.severity]
    text = Text()
    text.append(f"{diagnostic.severity}[{diagnostic.code}]", style)
    text.append(f": {_visible(diagnostic.message)}", "bold")
    marks = _marks(diagnostic)
    pad = " " * max((len(str(mark.span.line)) for mark in marks), default=1)
    for source in dict.fromkeys(mark.span.source for mark in marks):
        _append_source(text, [mark for mark in marks if mark.span.source is source], pad, width)
    for note in diagnostic.notes:
        text.append(f"\n{pad} = ", _FRAME).append("note", "bold").append(f": {_visible(note)}")
    if diagnostic.help:
        text.append(f"\n{pad} = ", _FRAME).append("help", "bold")
        text.append(f": {_visible(diagnostic.help)}")
    return text


@dataclass(frozen=True)
class _Mark:
    span: Span
    label: str
    primary: bool
    style: str


def _marks(diagnostic: Diagnostic) -> list[_Mark]:
    marks = [_Mark(span, label, False, _FRAME) for span, label in diagnostic.secondary]
    if diagnostic.span is not None:
        style = _STYLE[diagnostic.severity]
        marks.insert(0, _Mark(diagnostic.span, diagnostic.label, True, style))
    return marks


def _append_source(text: Text, marks: Sequence[_Mark], pad: str, width: int) -> None:
    first = marks[0]
    arrow = "-->" if first.primary else ":::"
    text.append(f"\n{pad}{arrow} ", _FRAME)
    text.append(f"{_visible(first.span.source.name)}:{first.span.line}:{first.span.column}")
    text.append(f"\n{pad} |", _FRAME)
    previous = None
    for number in sorted({mark.span.line for mark in marks}):
        if previous is not None and number > previous + 1:
            text.append("\n...", _FRAME)
        previous = number
        here = [mark for mark in marks if mark.span.line == number]
        _append_line(text, number, here, pad, width)


def _append_line(text: Text, number: int, marks: Sequence[_Mark], pad: str, width: int) -> None:
    line = marks[0].span.source.line(number)
    room = max(width - len(pad) - 3, 40)
    from_ = _window_start(line, marks[0].span.column - 1, room)
    shown = _visible(line[from_ : from_ + room])
    text.append(f"\n{number:>{len(pad)}} |", _FRAME)
    text.append(f" {'…' if from_ else ''}{shown}".rstrip())
    for mark in marks:
        start = mark.span.column - 1
        end = min(start + max(mark.span.end - mark.span.start, 1), max(len(line), start + 1))
        lead = cell_len(_visible(line[from_:start])) + bool(from_)
        width_of_mark = max(cell_len(_visible(line[start : min(end, from_ + room)])), 1)
        text.append(f"\n{pad} | ", _FRAME)
        text.append(" " * lead + ("^" if mark.primary else "-") * width_of_mark, mark.style)
        if mark.label:
            text.append(f" {_visible(mark.label)}", mark.style)


def _window_start(line: str, column: int, room: int) -> int:
    return 0 if len(line) <= room or column < room // 2 else column - room // 4


def _visible(text: str) -> str:
    """Show what a terminal would obey: tabs as four blanks, other control characters as a box."""
    text = text.replace("\t", "    ")
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)
