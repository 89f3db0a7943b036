"""What is written out of habit from other languages, and what it is in this one."""

import re
from collections.abc import Iterator
from typing import Any

from lark import Token, Tree

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.correction import Correction, Failure, instead, last
from lora_fx.spec.patched import Patched
from lora_fx.spec.pattern_habits import pattern_habits
from lora_fx.spec.recovery import KEYWORDS

# What stands there, the terminal that could, and how that is written.
_SIGNS = (
    (re.compile(r":=|:|=>"), "EQUAL", "="),
    (re.compile(r":"), "THEN", "then"),
    (re.compile(r"="), "COMPARE", "=="),
    (re.compile(r"&&?"), "AND", "and"),
    (re.compile(r"\|\|?"), "OR", "or"),
    (re.compile(r"!"), "NOT", "not"),
)
_COMMENT = re.compile(r"//|/\*.*?(\*/|\Z)", re.DOTALL)
_BEFORE_CLAUSE = re.compile(r",\s*(except|in|where)\s*\Z")
_FRACTION = re.compile(r"\.[0-9]+")
_NAMED_BLOCK = re.compile(r"=?\s*([A-Za-z_]\w*)\s*\{")
_CONDITIONAL = re.compile(r"if\b([^{}]*?)\belse\b")


def habits(failure: Failure, patched: Patched) -> Iterator[Correction]:
    """Yield corrections; whether one helps is not known yet."""
    yield from _comment(failure, patched)
    yield from _conditional(failure, patched)
    yield from _named_optimizer(failure, patched)
    yield from _sign(failure, patched)
    yield from pattern_habits(failure, patched)
    yield from _comma(failure, patched)


def _comment(failure: Failure, patched: Patched) -> Iterator[Correction]:
    slash = last(failure, "MULTIPLY") if failure.shown in ("`/`", "`*`") else None
    start = failure.start if slash is None else slash.start_pos or 0
    found = _COMMENT.match(patched.text, start)
    if found:
        help = "a comment begins with `#`" + "; `/` divides" * (slash is not None)
        text = "# " if found[0] == "//" else re.sub(r"[^\n]", " ", found[0])
        yield instead(found, f"unexpected `{found[0][:2]}`", help, text, patched)


def _conditional(failure: Failure, patched: Patched) -> Iterator[Correction]:
    """Turn `x if c else y` into `if c then x else y`."""
    word = last(failure, "NAME")
    found = _CONDITIONAL.match(patched.text, word.start_pos or 0) if word else None
    value = _last_value(failure.stack[-2]) if found and len(failure.stack) > 1 else None
    if found is None or value is None:
        return
    start, end = value.meta.start_pos, value.meta.end_pos
    ours = f"if {found[1].strip()} then {patched.text[start:end]} else"
    span = patched.span(found.start(), found.start() + 2)
    message = "the condition comes before the values"
    diagnostic = Diagnostic("syntax-error", message, span, help=f"write `{ours} …`")
    yield Correction(diagnostic, start, found.end(), ours)


def _named_optimizer(failure: Failure, patched: Patched) -> Iterator[Correction]:
    found = _NAMED_BLOCK.match(patched.text, failure.start)
    if found and last(failure, "OPTIMIZER"):
        ours = f"{{ name = {found[1]} "
        message = "the name of the optimizer stands inside its block"
        yield instead(found, message, f"write `optimizer {ours}… }}`", ours, patched)


def _sign(failure: Failure, patched: Patched) -> Iterator[Correction]:
    equal = last(failure, "EQUAL")
    twice = re.compile("==").match(patched.text, equal.start_pos or 0) if equal else None
    if twice:
        yield instead(twice, "expected `=`, found `==`", None, " =", patched)
    before = failure.stack[-1] if failure.stack else None
    keyword = isinstance(before, Token) and before.type.lower() in {*KEYWORDS, "else"}
    keyword = keyword and failure.accepts != {"LBRACE"}
    needless = re.compile("[:=]").match(patched.text, failure.start) if keyword else None
    if needless:
        message = f"unexpected `{needless[0]}`"
        yield instead(needless, message, f"leave it out behind `{before}`", " ", patched)
    fraction = _FRACTION.match(patched.text, failure.start)
    if fraction and "FLOAT" in failure.accepts:
        message = f"expected a digit before `{fraction[0]}`"
        yield instead(fraction, message, f"write `0{fraction[0]}`", f" 0{fraction[0]}", patched)
    for pattern, terminal, ours in _SIGNS:
        found = pattern.match(patched.text, failure.start)
        if found and terminal in failure.accepts:
            message = f"expected `{ours}`, found `{found[0]}`"
            yield instead(found, message, None, f" {ours} ", patched)


def _comma(failure: Failure, patched: Patched) -> Iterator[Correction]:
    """Leave out a comma behind a statement, or behind the last of its parts."""
    before = [value for value in failure.stack[-2:] if isinstance(value, Token)]
    places = [value.start_pos or 0 for value in before if value.type == "COMMA"]
    word = last(failure, "NAME")
    clause = _BEFORE_CLAUSE.search(patched.text, 0, word.start_pos or 0) if word else None
    places += [clause.start()] if clause else []
    for start in (failure.start, *reversed(places)):
        found = re.compile(",").match(patched.text, start)
        if found:
            help = "leave it out: a comma stands only between the parts of a list"
            yield instead(found, "unexpected `,`", help, " ", patched)


def _last_value(node: Any) -> Tree[Any] | None:
    """Return the value of the attribute, or of the constant, that a node ends with."""
    while isinstance(node, Tree) and node.children:
        last = node.children[-1]
        if node.data in ("attribute", "let"):
            return last if isinstance(last, Tree) else None
        node = last
    return None
