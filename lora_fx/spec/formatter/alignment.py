"""The `=` of attributes in adjacent lines, and the `->` of routes, in one column."""

from collections.abc import Sequence
from dataclasses import replace

from lora_fx.spec.formatter.spacing import joined
from lora_fx.spec.formatter.statements import Statement

_MOST_COLUMNS = 40


def aligned(statements: Sequence[Statement]) -> list[Statement]:
    """Return the statements of a block with blanks before what stands in one column."""
    runs: list[list[Statement]] = []
    for statement in statements:
        if runs and _continues(runs[-1][-1], statement):
            runs[-1].append(statement)
        else:
            runs.append([statement])
    return [statement for run in runs for statement in _in_one_column(run)]


def _continues(before: Statement, statement: Statement) -> bool:
    first, at, at_before = statement.head[0], _operator(statement), _operator(before)
    if at is None or at_before is None or first.after_blank_line:
        return False
    same = statement.head[at].kind == before.head[at_before].kind
    return same and not any(comment.own_line for comment in first.comments)


def _operator(statement: Statement) -> int | None:
    """Return which piece is the `=` of an attribute or the `->` of a route."""
    for at, piece in enumerate(statement.head[:3]):
        if at and piece.comments:
            return None
        if piece.kind in ("EQUAL", "ARROW"):
            return at
    return None


def _in_one_column(run: Sequence[Statement]) -> list[Statement]:
    if len(run) == 1:
        return list(run)
    lefts = [joined(statement.head[: _operator(statement)]) for statement in run]
    width = max(map(len, lefts))
    if width > _MOST_COLUMNS:
        return list(run)
    return [_padded(s, left.ljust(width)) for s, left in zip(run, lefts, strict=True)]


def _padded(statement: Statement, left: str) -> Statement:
    first = replace(statement.head[0], text=left)
    return replace(statement, head=[first, *statement.head[_operator(statement) :]])
