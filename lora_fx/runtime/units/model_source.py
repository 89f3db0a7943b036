"""Places in the Python source of a model, for diagnostics."""

import linecache
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import torch

from lora_fx.diagnostics import Source, Span

Place = tuple[str, int]  # a file and a line, from 1
_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parents[2])


def innermost(places: Iterable[Place]) -> Place | None:
    """Return the last place that is neither torch's nor ours."""
    return next((p for p in reversed(list(places)) if not _is_in(p[0], _LIBRARIES)), None)


def innermost_of_trace(trace: str) -> Place | None:
    """Return the innermost place of a printed stack."""
    return innermost((f, int(n)) for f, n in re.findall(r'File "(.+)", line (\d+)', trace))


def caller(frame: FrameType | None) -> Place | None:
    """Return the innermost place of a live stack, given its innermost frame."""
    while frame is not None and _is_in(frame.f_code.co_filename, _LIBRARIES):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def span_of(place: Place | None) -> Span | None:
    """Return the line of a place; None if its file cannot be read."""
    if place is None:
        return None
    file, number = place
    lines = linecache.getlines(file)
    if not 0 < number <= len(lines):
        return None
    source = Source(_shortest(file), "".join(lines))
    start, line = source.line_start(number), source.line(number)
    return Span(source, start + len(line) - len(line.lstrip()), start + len(line.rstrip()))


def _shortest(file: str) -> str:
    """Return a file's name from the folder on that Python found it in."""
    folders = [Path(entry) for entry in sys.path if entry and _is_in(file, [Path(entry)])]
    names = (str(Path(file).relative_to(folder)) for folder in folders)
    return min(names, key=len, default=file)


def _is_in(file: str, folders: Iterable[Path]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)
