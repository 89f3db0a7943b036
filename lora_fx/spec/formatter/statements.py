"""Statements and their blocks, as the pieces that they consist of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lark import Tree

from lora_fx.spec.formatter.pieces import Piece

_HOLD_STATEMENTS = {"start", "layers", "adapter", "route", "merge", "compile", "block"}


@dataclass
class Statement:
    """A statement up to its `{`, what stands in its block, and the `}`."""

    head: list[Piece]
    body: list["Statement"] = field(default_factory=list)
    close: Piece | None = None

    def inside(self) -> Iterator[Piece]:
        """Return the pieces behind `{`, up to and with `}`."""
        for statement in self.body:
            yield from statement.head
            yield from statement.inside()
        if self.close is not None:
            yield self.close


def starts(tree: Tree[Any]) -> set[int]:
    """Return the offsets at which statements begin."""
    holding = (node for node in tree.iter_subtrees() if node.data in _HOLD_STATEMENTS)
    children = (child for node in holding for child in node.children)
    return {
        child.meta.start_pos
        for child in children
        if isinstance(child, Tree) and child.data != "block"
    }


def read_statements(pieces: Sequence[Piece], starts: set[int]) -> tuple[list[Statement], Piece]:
    """Return the statements of a file, the header first, and the end of the file."""
    file: list[Statement] = []
    blocks = [file]
    for piece in pieces[:-1]:
        if piece.kind == "RBRACE":
            blocks.pop()
            blocks[-1][-1].close = piece
            continue
        if piece.start in starts:
            blocks[-1].append(Statement([]))
        statement = blocks[-1][-1]
        statement.head.append(piece)
        if piece.kind == "LBRACE":
            blocks.append(statement.body)
    return file, pieces[-1]
