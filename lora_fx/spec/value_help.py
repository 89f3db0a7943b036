"""What to write in the place of a value that an attribute does not have."""

import re
from collections.abc import Iterable

from lora_fx.spec.closest import closest
from lora_fx.spec.expressions import Value
from lora_fx.spec.other_words import other_value
from lora_fx.spec.rule import Rule

_TRUTHS = {"true": True, "false": False}


def help_for_text(text: str, rule: Rule) -> str | None:
    """Return the help for a text in quotes that is no value of this rule."""
    ours = _said_here(text, rule) or (text if _is_value(text, rule) else None)
    if ours is not None:
        return f"write `{ours}` without quotes"
    return _closest(text, rule.words)


def help_for_word(word: str, rule: Rule, names: Iterable[str] = ()) -> str | None:
    """Return the help for a bare word that is no value of this rule; `names` have one here too."""
    ours = _said_here(word, rule)
    if ours is not None:
        return f"write `{ours}`"
    if rule.accepts(word):
        return f'texts stand in double quotes: `"{word}"`'
    return _closest(word, (*rule.words, *names))


def _said_here(text: str, rule: Rule) -> str | None:
    ours = other_value(text)
    return ours if ours is not None and _is_value(ours, rule) else None


def _is_value(text: str, rule: Rule) -> bool:
    """Whether a text is, without its quotes, a value of this rule."""
    if text.partition("(")[0] in rule.words:
        return True
    value: Value | None = _TRUTHS.get(text)
    if re.fullmatch(r"-?[0-9]{1,15}", text):
        value = int(text)
    elif re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text):
        value = float(text)
    return value is not None and rule.accepts(value)


def _closest(word: str, known: Iterable[str]) -> str | None:
    found = closest(word, known)
    return None if found is None else f"did you mean `{found}`?"
