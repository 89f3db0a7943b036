"""Lines of text, and the column in which the comments behind them stand."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

WIDTH = 100


@dataclass
class Line:
    """A line with its indent, and the comment behind it; a comment on its own line is text."""

    text: str
    comment: str = ""


def text_of(lines: Sequence[Line]) -> str:
    """Return the lines as text; comments behind adjacent lines of usual width share a column."""
    texts: list[str] = []
    for aligned, group in groupby(lines, _is_aligned):
        run = list(group)
        width = max(len(line.text) for line in run) if aligned else 0
        texts += [f"{line.text:<{width}}  {line.comment}".rstrip() for line in run]
    return "\n".join(texts) + "\n"


def _is_aligned(line: Line) -> bool:
    return bool(line.comment) and len(line.text) <= WIDTH
