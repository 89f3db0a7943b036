"""Diagnostics as text, in the manner of rustc."""

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from lora_fx.diagnostics.diagnostic import Diagnostic, Severity
from lora_fx.diagnostics.excerpt import FRAME, Excerpt, Pointer
from lora_fx.diagnostics.visible import visible, wrapped

_STYLE: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "note": "bold green"}


def render(diagnostics: Iterable[Diagnostic], width: int | None = None, color: bool = False) -> str:
    """Return the diagnostics as text, a blank line between two; `color` adds ANSI codes."""
    texts = [to_rich(diagnostic, width) for diagnostic in diagnostics]
    joined = Text("\n\n").join(texts)
    if not color:
        return joined.plain
    console = Console(force_terminal=True, no_color=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(joined, end="")
    return capture.get()


def to_rich(diagnostic: Diagnostic, width: int | None = None) -> Text:
    """Return one diagnostic as styled text.

    Source lines that are too wide are cut to a window. `width` is the terminal's: sentences are
    broken there; where there is no terminal, they are not.
    """
    title = f"{diagnostic.severity}[{diagnostic.code}]"
    text = Text.assemble((title, _STYLE[diagnostic.severity]), ": ")
    text.append(_lines(diagnostic.message, len(title) + 2, width), "bold")
    pointers = _pointers(diagnostic)
    pad = " " * max((len(str(p.span.last_line)) for p in pointers), default=1)
    arrow = f"\n{pad}--> "
    for source in dict.fromkeys(pointer.span.source for pointer in pointers):
        here = [pointer for pointer in pointers if pointer.span.source == source]
        text.append(arrow, FRAME)
        _append_source(text, here, pad, width)
        arrow = f"\n{pad} |\n{pad}::: "
    for note in diagnostic.notes:
        _append_footer(text, pad, "note", note, width)
    if diagnostic.help:
        _append_footer(text, pad, "help", diagnostic.help, width)
    return text


def _pointers(diagnostic: Diagnostic) -> list[Pointer]:
    """Return what is to be marked, the primary span first."""
    pointers = [Pointer(span, label, False, FRAME) for span, label in diagnostic.secondary]
    if diagnostic.span is not None:
        style = _STYLE[diagnostic.severity]
        pointers.insert(0, Pointer(diagnostic.span, diagnostic.label, True, style))
    return pointers


def _append_source(text: Text, pointers: list[Pointer], pad: str, width: int | None) -> None:
    span = pointers[0].span
    text.append(f"{visible(span.source.name)}:{span.line}:{span.column}")
    text.append(f"\n{pad} |", FRAME)
    for row in Excerpt(pointers, pad, width).rows():
        text.append("\n").append(row)


def _append_footer(text: Text, pad: str, word: str, content: str, width: int | None) -> None:
    text.append(f"\n{pad} = ", FRAME).append(word, "bold").append(": ")
    text.append(_lines(content, len(pad) + 3 + len(word) + 2, width))


def _lines(content: str, indent: int, width: int | None) -> str:
    """Return the lines of a sentence below each other."""
    room = width and width - indent
    lines = [part for line in content.splitlines() for part in wrapped(visible(line), room)]
    return f"\n{' ' * indent}".join(lines)
