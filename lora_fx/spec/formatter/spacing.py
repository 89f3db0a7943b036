"""What stands between two pieces on one line, and where a line may be broken."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from lora_fx.spec.formatter.pieces import Piece

_OPENING = {"LPAR", "LSQB", "DOT", "MINUS", "SIGN"}
_CLOSING = {"RPAR", "RSQB", "DOT", "COMMA", "OPTIONAL"}
_TOGETHER = {
    ("VALUE", "LPAR"),
    ("LAYERS", "LSQB"),
    ("STRING", "LSQB"),
    ("INT", "DOTS"),
    ("DOTS", "INT"),
}
_BREAK_BEFORE = {"EXCEPT", "IN", "WHERE", "THEN", "ELSE", "AND", "OR", "ADD", "COLON"}


def joined(pieces: Sequence[Piece]) -> str:
    """Return the pieces as they stand on one line."""
    rest = (separator(before, piece) + piece.text for before, piece in pairwise(pieces))
    return pieces[0].text + "".join(rest)


def separator(before: Piece, piece: Piece) -> str:
    """Return what stands between two pieces of a line: a blank, or nothing."""
    together = (
        before.kind in _OPENING or piece.kind in _CLOSING or (before.kind, piece.kind) in _TOGETHER
    )
    return "" if together else " "


def chunks(pieces: Sequence[Piece], width: int) -> Iterator[list[Piece]]:
    """Yield the parts of a statement between the places where it may or must be broken.

    Inside brackets it may be broken only where it would be wider than `width` otherwise.
    """
    for part in _split(pieces, inside_brackets=False):
        if len(joined(part)) <= width:
            yield part
        else:
            yield from _split(part, inside_brackets=True)


def _split(pieces: Sequence[Piece], inside_brackets: bool) -> list[list[Piece]]:
    parts: list[list[Piece]] = []
    depth = 0
    for piece in pieces:
        depth -= piece.kind in ("RPAR", "RSQB")
        breakable = inside_brackets or depth <= 0
        if not parts or piece.comments or (breakable and _may_break(parts[-1][-1], piece)):
            parts.append([piece])
        else:
            parts[-1].append(piece)
        depth += piece.kind in ("LPAR", "LSQB")
    return parts


def _may_break(before: Piece, piece: Piece) -> bool:
    return before.kind == "COMMA" or piece.kind in _BREAK_BEFORE
