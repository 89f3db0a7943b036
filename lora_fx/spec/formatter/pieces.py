"""Tokens with what stands before them: comments, blank lines, line breaks."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lark import Token

from lora_fx.spec.recovery import KEYWORDS

_COMMENT = re.compile(r"#[^\n]*")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_END = "$END"
_KEYWORDS = KEYWORDS | {"and", "or", "then", "else", "except", "in", "where"}
# A comment before one of these stands behind it afterwards: `q # a`, `, v` as `q,  # a`, `v`.
_HELD_BACK = {"COMMA", "EQUAL", "LBRACE", "ARROW"}


@dataclass(frozen=True)
class Comment:
    """A comment, on a line of its own or behind something."""

    text: str
    own_line: bool
    after_blank_line: bool


@dataclass(frozen=True)
class Piece:
    """A token that stays, or the end of the file, and what stands before it.

    A `;` stays, as the end of `text`, where the name of an attribute would be a keyword otherwise.
    `kind` is Lark's name of the terminal, but for `->`, `..` and the sign that begins a mix:
    ARROW, DOTS and SIGN.
    """

    text: str
    kind: str
    start: int
    on_new_line: bool
    after_blank_line: bool
    comments: tuple[Comment, ...]


def read_pieces(text: str, tokens: Sequence[Token]) -> list[Piece]:
    """Return the tokens of a text without those that say nothing, and the end of the file."""
    end = Token(_END, "", start_pos=len(text), end_pos=len(text))
    pieces: list[Piece] = []
    at = 0
    for token, following in pairwise([*tokens, end, end]):
        if token.type == "SEMICOLON" and _is_like_a_keyword(following):
            pieces[-1] = replace(pieces[-1], text=f"{pieces[-1].text};")
        elif not _says_nothing(token, following):
            start = token.start_pos or 0
            pieces.append(_piece(token, text[at:start], pieces))
            at = token.end_pos or start
    return list(_comments_held_back(pieces))


def _says_nothing(token: Token, following: Token) -> bool:
    comma = token.type == "COMMA" and following.type in ("RPAR", "RSQB")
    return comma or token.type == "SEMICOLON"


def _is_like_a_keyword(token: Token) -> bool:
    """Whether this is the name of an attribute only because a `;` stands before it."""
    return token.type == "NAME" and token in _KEYWORDS


def _piece(token: Token, gap: str, before: Sequence[Piece]) -> Piece:
    comments: list[Comment] = []
    at = 0
    for found in _COMMENT.finditer(gap):
        between = gap[at : found.start()]
        own_line = "\n" in between or not before
        comments.append(Comment(found[0].rstrip(), own_line, bool(_BLANK_LINE.search(between))))
        at = found.end()
    return Piece(
        str(token),
        _kind(token, before),
        token.start_pos or 0,
        "\n" in gap,
        bool(_BLANK_LINE.search(gap[at:])),
        tuple(comments),
    )


def _kind(token: Token, before: Sequence[Piece]) -> str:
    if token.type == "ADD" and before[-1].kind in ("FROM", "ARROW"):
        return "SIGN"
    return {"->": "ARROW", "..": "DOTS"}.get(str(token), token.type)


def _comments_held_back(pieces: Sequence[Piece]) -> Iterator[Piece]:
    held: tuple[Comment, ...] = ()
    for piece in pieces:
        own = tuple(replace(comment, own_line=True) for comment in piece.comments)
        comments = held + own if held else piece.comments
        held = comments if piece.kind in _HELD_BACK else ()
        yield replace(piece, comments=() if held else comments)
