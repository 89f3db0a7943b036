"""Places in the Python source of a model, for diagnostics."""

import linecache
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

from lora_fx.diagnostics import Source, Span

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[1])


def line_of(file: str, number: int) -> Span | None:
    """Return a line of a file as a place; None if it cannot be read."""
    lines = linecache.getlines(file)
    if not 0 < number <= len(lines):
        return None
    source = Source(_shortest(file), "".join(lines))
    start = source.line_start(number)
    line = source.line(number)
    return Span(source, start + len(line) - len(line.lstrip()), start + len(line.rstrip()))


def innermost(places: Iterable[tuple[str, int]]) -> Span | None:
    """Return the last of some files and lines that is neither torch's nor ours."""
    own = [place for place in places if not _is_in(place[0], _LIBRARIES)]
    return line_of(*own[-1]) if own else None


def line_of_trace(trace: str) -> Span | None:
    """Return the innermost place of a printed stack."""
    return innermost((f, int(n)) for f, n in re.findall(r'File "(.+)", line (\d+)', trace))


def calling_line(frame: FrameType | None) -> Span | None:
    """Return the innermost place on a stack, the innermost frame being given."""
    while frame is not None and _is_in(frame.f_code.co_filename, _LIBRARIES):
        frame = frame.f_back
    return None if frame is None else line_of(frame.f_code.co_filename, frame.f_lineno)


def _shortest(file: str) -> str:
    """Return a file's name from the folder on that Python found it in."""
    folders = [Path(entry) for entry in sys.path if entry and _is_in(file, [Path(entry)])]
    names = (str(Path(file).relative_to(folder)) for folder in folders)
    return min(names, key=len, default=file)


def _is_in(file: str, folders: Iterable[Path]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)
