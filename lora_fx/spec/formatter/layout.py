"""Statements as lines."""

from collections.abc import Sequence
from dataclasses import replace

from lora_fx.spec.formatter.alignment import aligned
from lora_fx.spec.formatter.lines import WIDTH, Line
from lora_fx.spec.formatter.pieces import Piece
from lora_fx.spec.formatter.spacing import chunks, joined, separator
from lora_fx.spec.formatter.statements import Statement

_INDENT = 2
_CONTINUATION = 4


def file_lines(statements: Sequence[Statement], end: Piece) -> list[Line]:
    """Return the lines of a file; blocks of several lines stand between blank lines."""
    lines: list[Line] = []
    previous_is_tall = False
    for number, statement in enumerate(statements):
        own = _statement_lines(statement, 0)
        tall = statement.close is not None and len(own) > 1
        first = statement.head[0]
        if number > 1 and (tall or previous_is_tall):
            first = _apart(first)
        _append_lead(lines, first, 0, 0)
        lines += own
        previous_is_tall = tall
    _append_lead(lines, replace(end, after_blank_line=False), 0, 0)
    return lines


def _apart(piece: Piece) -> Piece:
    """Put a blank line somewhere before a piece and its comments, if there is none."""
    if piece.after_blank_line or any(comment.after_blank_line for comment in piece.comments):
        return piece
    comments = list(piece.comments)
    for i, comment in enumerate(comments):
        if comment.own_line:
            comments[i] = replace(comment, after_blank_line=True)
            return replace(piece, comments=tuple(comments))
    return replace(piece, after_blank_line=True)


def _append_lead(lines: list[Line], piece: Piece, opened: int, indent: int) -> None:
    """Append what stands before a piece, in a block whose lines begin at `opened`."""
    for comment in piece.comments:
        if not comment.own_line:
            lines[-1].comment = comment.text
            continue
        if comment.after_blank_line and len(lines) > opened:
            lines.append(Line(""))
        lines.append(Line(" " * indent + comment.text))
    if piece.after_blank_line and len(lines) > opened:
        lines.append(Line(""))


def _statement_lines(statement: Statement, indent: int) -> list[Line]:
    if statement.close is None:
        return _filled(statement.head, indent)
    if _is_short(statement):
        line = " " * indent + _one_line(statement)
        if len(line) <= WIDTH:
            return [Line(line)]
    lines = _filled(statement.head, indent)
    opened = len(lines)
    for inner in aligned(statement.body):
        _append_lead(lines, inner.head[0], opened, indent + _INDENT)
        lines += _statement_lines(inner, indent + _INDENT)
    end = replace(statement.close, after_blank_line=False)
    _append_lead(lines, end, opened, indent + _INDENT)
    return [*lines, Line(" " * indent + statement.close.text)]


def _is_short(statement: Statement) -> bool:
    """Whether a block was on one line, or is empty, and its statement has no comment inside."""
    inside = list(statement.inside())
    broken = len(inside) > 1 and any(piece.on_new_line for piece in inside)
    return not broken and not any(piece.comments for piece in statement.head[1:] + inside)


def _one_line(statement: Statement) -> str:
    text = joined(statement.head)
    if statement.close is None:
        return text
    inside = "  ".join(_one_line(inner) for inner in statement.body)
    return " ".join(filter(None, [text, inside, statement.close.text]))


def _filled(pieces: Sequence[Piece], indent: int) -> list[Line]:
    """Return a statement without its block, broken where it has to be."""
    lines: list[Line] = []
    before: Piece | None = None
    for chunk in chunks(pieces, WIDTH - indent - _CONTINUATION):
        text = joined(chunk)
        if before is None:
            lines.append(Line(" " * indent + text))
        elif chunk[0].comments:
            _append_comments(lines, chunk[0], indent + _CONTINUATION)
            lines.append(Line(" " * (indent + _CONTINUATION) + text))
        elif len(longer := lines[-1].text + separator(before, chunk[0]) + text) <= WIDTH:
            lines[-1].text = longer
        else:
            lines.append(Line(" " * (indent + _CONTINUATION) + text))
        before = chunk[-1]
    return lines


def _append_comments(lines: list[Line], piece: Piece, indent: int) -> None:
    for comment in piece.comments:
        if comment.own_line:
            lines.append(Line(" " * indent + comment.text))
        else:
            lines[-1].comment = comment.text
