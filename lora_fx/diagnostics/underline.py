"""Marks under one line: carets and dashes, and the labels beside and below them.

    let a = b + c
        -   ^   - the label of the last mark stands beside it
        |   |
        |   the others hang below, from right to left
        so that none crosses another

Cells count from 0, at the first character that is shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len
from rich.text import Text

from lora_fx.diagnostics.visible import visible, wrapped


@dataclass(frozen=True)
class Mark:
    """A mark under the cells from `start` to before `end`, at least one."""

    start: int
    end: int
    label: str
    primary: bool
    style: str


def underline(marks: Sequence[Mark], room: int | None) -> list[Text]:
    """Return the rows under a line; a label that has no room beside its mark hangs below it."""
    rows = [_carets(marks)]
    last = max(marks, key=lambda mark: (mark.end, mark.start))
    beside = room is None or last.end + 1 + cell_len(shown(last.label)) <= room
    if last.label and beside:
        rows[0].append(f" {shown(last.label)}", last.style)
    hanging = [mark for mark in marks if mark.label and not (beside and mark is last)]
    hanging.sort(key=lambda mark: mark.start, reverse=True)
    if hanging:
        rows.append(_bars(hanging))
    for i, mark in enumerate(hanging):
        left = [other for other in hanging[i + 1 :] if other.start < mark.start]
        for line in wrapped(shown(mark.label), room and room - mark.start):
            row = _bars(left)
            row.pad_right(mark.start - len(row))
            rows.append(row.append(line, mark.style))
    return rows


def shown(label: str) -> str:
    """Return a label as it stands in a row."""
    return visible(" ".join(label.splitlines()))


def _carets(marks: Sequence[Mark]) -> Text:
    """Dashes first, carets over them."""
    cells = [(" ", "")] * max(mark.end for mark in marks)
    for mark in sorted(marks, key=lambda mark: mark.primary):
        character = "^" if mark.primary else "-"
        cells[mark.start : mark.end] = [(character, mark.style)] * (mark.end - mark.start)
    return _row(cells)


def _bars(marks: Sequence[Mark]) -> Text:
    cells = [(" ", "")] * (max((mark.start for mark in marks), default=-1) + 1)
    for mark in marks:
        cells[mark.start] = ("|", mark.style)
    return _row(cells)


def _row(cells: list[tuple[str, str]]) -> Text:
    row = Text()
    for style, run in groupby(cells, key=itemgetter(1)):
        row.append("".join(character for character, _ in run), style or None)
    return row
