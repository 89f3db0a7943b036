"""What Lark could not read, in the words of the language, and how to read on."""

import re
from collections.abc import Iterator, Set
from typing import Any

from lark import Lark, Token, UnexpectedCharacters, UnexpectedInput
from lark.lexer import PatternStr

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.brackets import closing, skip_to_closing
from lora_fx.spec.closest import closest
from lora_fx.spec.correction import Correction, Failure
from lora_fx.spec.habits import habits
from lora_fx.spec.other_words import other_setting
from lora_fx.spec.patched import Patched
from lora_fx.spec.recovery import (
    INNER_STATEMENTS,
    KEYWORDS,
    STATEMENTS,
    next_statement,
    statement_start,
)

_INSERTED = {
    "EQUAL": "=",
    "COMMA": ",",
    "RPAR": ")",
    "RSQB": "]",
    "LBRACE": "{",
    "RBRACE": "}",
    "THEN": "then",
    "ELSE": "else",
}
_KINDS = (
    ({"FLOAT", "PERCENT", "IF"}, "an expression"),
    ({"LINEAR", "CLASS", "REGEX"}, "a selector"),
    ({"ADAPTER", "LET"}, "a statement"),
    ({"TARGET", "USE"}, "an attribute, `target` or `use`"),
)
_WORDS = {
    "NAME": "a name",
    "VALUE": "a name",
    "STRING": "a quoted text",
    "INT": "a whole number",
    "FLOAT": "a number",
    "$END": "the end of the file",
}


def explain(error: UnexpectedInput, patched: Patched, grammar: Lark) -> Correction:
    """Return the mistake that stopped `grammar` on this text."""
    failure = _failure(error, patched.text)
    correction = _missing_header(failure, patched) or _unclosed_block(failure, patched)
    if correction is not None:
        return correction
    unexpected = _bad_character(failure, patched) or _unexpected(failure, patched, grammar)
    for correction in (
        *habits(failure, patched),
        *_other_statement(failure, patched),
        *(_misspellings(failure, patched) if failure.is_token else ()),
        *(_insertions(failure, patched) if failure.is_token else ()),
        *skip_to_closing(failure, patched, unexpected),
    ):
        if _gets_past(correction, failure, patched, grammar):
            return correction
    return _skip(failure, patched, unexpected)


def _failure(error: UnexpectedInput, text: str) -> Failure:
    interactive: Any = error.interactive_parser  # type: ignore[attr-defined]
    stack, accepts = interactive.parser_state.value_stack, interactive.accepts()
    if isinstance(error, UnexpectedCharacters):
        start = error.pos_in_stream or 0
        found = re.compile(r'[A-Za-z0-9_]+|"[^\n]*|.', re.DOTALL).match(text, start)
        end = found.end() if found else start + 1
        return Failure(start, end, f"`{text[start:end]}`", accepts, stack, False)
    token: Token = error.token  # type: ignore[attr-defined]
    if token.type == "$END":
        end = len(text)
        return Failure(end, end, "the end of the file", accepts, stack, True)
    start, end = token.start_pos or 0, token.end_pos or 0
    return Failure(start, end, f"`{token}`", accepts, stack, True)


def _missing_header(failure: Failure, patched: Patched) -> Correction | None:
    if failure.accepts != {"LORA"}:
        return None
    diagnostic = Diagnostic(
        "missing-header",
        "a file begins with the version of its language",
        patched.span(failure.start, failure.end),
        help="write `lora 1` first",
    )
    return Correction(diagnostic, failure.start, failure.start, "lora 1 ")


def _bad_character(failure: Failure, patched: Patched) -> Diagnostic | None:
    if failure.is_token:
        return None
    help = None
    if failure.shown.startswith('`"'):
        message = 'a quoted text has no closing `"` on its line'
    elif failure.shown[1].isalnum():
        message = f"{failure.shown} is neither a number nor a name"
    else:
        message = f"unexpected character {failure.shown}"
        help = 'texts stand in double quotes: `"`' if failure.shown == "`'`" else None
    return Diagnostic("syntax-error", message, patched.span(failure.start, failure.end), help=help)


def _unclosed_block(failure: Failure, patched: Patched) -> Correction | None:
    opened = [t for t in failure.stack if isinstance(t, Token) and t.type == "LBRACE"]
    if failure.start < len(patched.text) or "RBRACE" not in failure.accepts or not opened:
        return None
    start = opened[0].start_pos or 0
    diagnostic = Diagnostic(
        "unclosed-block", "`{` is never closed", patched.span(start, start + 1), help="write `}`"
    )
    return Correction(diagnostic, failure.end, failure.end, " }" * len(opened))


def _other_statement(failure: Failure, patched: Patched) -> Iterator[Correction]:
    """Leave out a statement that begins with a word of another tool."""
    before: Any = failure.stack[-1] if failure.stack else None
    help = other_setting(before) if isinstance(before, Token) else None
    if help is not None and failure.accepts == {"EQUAL"}:
        span = patched.span(before.start_pos or 0, before.end_pos or 0)
        message = f"there is no statement `{before}`"
        yield _skip(failure, patched, Diagnostic("unknown-statement", message, span, help=help))


def _misspellings(failure: Failure, patched: Patched) -> Iterator[Correction]:
    before: Any = failure.stack[-1] if failure.stack else None
    if isinstance(before, Token) and before.type == "NAME" and failure.accepts == {"EQUAL"}:
        start, end = before.start_pos or 0, before.end_pos or 0
        word = closest(before, INNER_STATEMENTS)
        if word is not None:
            yield _misspelt(str(before), word, start, end, patched)
        if re.search(r"[^\s{;][^\S\n]*$", patched.text[:start]):
            yield _missing("`,`", f"`{before}`", start, end, ", ", patched)
    found = failure.shown.strip("`")
    if "ADAPTER" in failure.accepts and found.isidentifier():
        word = closest(found, STATEMENTS)
        if word is not None:
            yield _misspelt(found, word, failure.start, failure.end, patched)


def _insertions(failure: Failure, patched: Patched) -> Iterator[Correction]:
    closed = closing(failure, patched) is not None
    for terminal, text in _INSERTED.items():
        if terminal == "COMMA" and failure.shown.strip("`") in KEYWORDS:
            continue
        if terminal == "LBRACE" and "ADAPTER" in failure.accepts:
            continue
        if terminal in failure.accepts and not (closed and text in ")]"):
            span = (failure.start, failure.end)
            yield _missing(f"`{text}`", failure.shown, *span, f" {text} ", patched)


def _misspelt(found: str, word: str, start: int, end: int, patched: Patched) -> Correction:
    diagnostic = Diagnostic(
        "unknown-statement",
        f"there is no statement `{found}`",
        patched.span(start, end),
        help=f"did you mean `{word}`?",
    )
    return Correction(diagnostic, start, end, word)


def _missing(
    what: str, before: str, start: int, end: int, text: str, patched: Patched
) -> Correction:
    span = patched.span(start, end)
    diagnostic = Diagnostic("syntax-error", f"expected {what} before {before}", span)
    return Correction(diagnostic, start, start, text)


def _gets_past(correction: Correction, failure: Failure, patched: Patched, grammar: Lark) -> bool:
    """Whether the corrected text can be read beyond the place where reading stopped."""
    if failure.end == failure.start:
        return False
    text = patched.replace(correction.start, correction.end, correction.text).text
    grown = len(correction.text) - (correction.end - correction.start)
    end = max(failure.end, correction.end) + grown
    try:
        grammar.parse(text[:end])
    except UnexpectedInput as error:
        token = getattr(error, "token", None)
        return token is not None and token.type == "$END"
    return True


def _unexpected(failure: Failure, patched: Patched, grammar: Lark) -> Diagnostic:
    expected = _expected(failure.accepts, grammar)
    if 0 < len(expected) <= 3:
        message = f"expected {' or '.join(expected)} before {failure.shown}"
    else:
        message = f"unexpected {failure.shown}"
    word = failure.shown.strip("`")
    help = None
    if "ADAPTER" in failure.accepts:
        home = "adapter" if word in ADAPTER else INNER_STATEMENTS.get(word)
        help = f"`{word}` stands inside `{home}`" if home else other_setting(word)
    return Diagnostic("syntax-error", message, patched.span(failure.start, failure.end), help=help)


def _expected(accepts: Set[str], grammar: Lark) -> list[str]:
    left = set(accepts) - {"SEMICOLON"}
    for terminals, words in _KINDS:
        if terminals <= left:
            return [words]
    return [_WORDS.get(name) or _keyword(name, grammar) for name in sorted(left)]


def _keyword(terminal: str, grammar: Lark) -> str:
    pattern = grammar.get_terminal(terminal).pattern
    return f"`{pattern.value if isinstance(pattern, PatternStr) else terminal.lower()}`"


def _skip(failure: Failure, patched: Patched, diagnostic: Diagnostic) -> Correction:
    """Read on without the statement in which reading stopped."""
    complete = bool({"ADAPTER", "RBRACE"} & failure.accepts)
    start = failure.start if complete else statement_start(failure.stack, failure.start)
    end = next_statement(patched.text, start, failure.start)
    blank = re.sub(r"[^\n]", " ", patched.text[start:end])
    return Correction(diagnostic, start, end, blank, whole=False)
