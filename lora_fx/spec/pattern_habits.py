"""What is written out of habit from other languages in patterns, texts and ranges of layers."""

import re
from collections.abc import Iterator

from lora_fx.spec.correction import Correction, Failure, instead, last
from lora_fx.spec.patched import Patched

_SINGLE_QUOTES = re.compile(r"'([^'\"\\\n]*)'")
_ALL_LINEAR = re.compile(r"all-linear\b")
_DOTTED = re.compile(r"[\w*]+(\.[\w*]+)+")
_BARE = re.compile(r"[\w*./~-]+")
_SLICE = re.compile(r"[0-9]* ?: ?[0-9]*|[0-9]+ ?- ?[0-9]+")
_LIST = re.compile(r"\[([^][{}]*)\]|\(([^(){}]*)\)")
_NAME_IN_QUOTES = re.compile(r'["\']([A-Za-z_]\w*)["\']')
_EXCEPT = ("exclude", "excluding", "without", "minus")


def pattern_habits(failure: Failure, patched: Patched) -> Iterator[Correction]:
    """Yield corrections; whether one helps is not known yet."""
    yield from _unquoted(failure, patched)
    yield from _list(failure, patched)
    yield from _slice(failure, patched)
    yield from _except(failure, patched)


def _unquoted(failure: Failure, patched: Patched) -> Iterator[Correction]:
    name = last(failure, "NAME")
    single = _SINGLE_QUOTES.match(patched.text, failure.start)
    if single:
        text = f'"{single[1]}"'
        help = f"texts stand in double quotes: `{text}`"
        yield instead(single, "unexpected character `'`", help, text, patched)
    linear = _ALL_LINEAR.match(patched.text, name.start_pos or 0) if name else None
    if linear:
        help = "write `linear`: every linear layer but the output head"
        yield instead(linear, "unexpected `-`", help, "linear", patched)
    dotted = _DOTTED.match(patched.text, name.start_pos or 0 if name else failure.start)
    if dotted:
        text = f'"**.{re.sub(r"^[*]+[.]", "", dotted[0])}"'
        help = f"write `{text}`; `**` stands for any names before"
        yield instead(dotted, "a name with dots stands in quotes", help, text, patched)
    start = name.start_pos or 0 if name and failure.accepts == {"LBRACE"} else failure.start
    bare = _BARE.match(patched.text, start)
    if bare and failure.accepts <= {"STRING", "LBRACE"}:
        text = f'"{bare[0]}"'
        yield instead(bare, f"`{bare[0]}` stands in quotes", f"write `{text}`", text, patched)


def _list(failure: Failure, patched: Patched) -> Iterator[Correction]:
    found = _LIST.match(patched.text, failure.start)
    if found and {"LINEAR", "REGEX"} <= failure.accepts:
        inside = (found[1] or found[2] or "").strip().rstrip(",")
        text = _NAME_IN_QUOTES.sub(r"\1", inside)
        message = f"unexpected `{found[0][0]}`: patterns stand in no brackets"
        yield instead(found, message, f"write `{text}`", f" {text}", patched)


def _slice(failure: Failure, patched: Patched) -> Iterator[Correction]:
    number = last(failure, "INT")
    found = _SLICE.match(patched.text, number.start_pos or 0 if number else failure.start)
    if found and "LSQB" in [getattr(value, "type", None) for value in failure.stack]:
        text = re.sub(" ?[:-] ?", "..", found[0])
        help = f"write `{text}`; the layer behind `..` does not belong to it"
        yield instead(found, f"`{found[0]}` is no range of layers", help, text, patched)


def _except(failure: Failure, patched: Patched) -> Iterator[Correction]:
    word = last(failure, "NAME")
    found = re.compile(r"\w+").match(patched.text, word.start_pos or 0) if word else None
    if found and found[0] in _EXCEPT:
        yield instead(found, f"expected `except`, found `{word}`", None, "except", patched)
