"""Where reading stopped, and how to read on."""

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from lark import Token

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.patched import Patched


@dataclass(frozen=True)
class Correction:
    """One mistake, and the text to read on with: `text` in place of `[start:end]`.

    Not `whole` if a part of what was meant is lost by it.
    """

    diagnostic: Diagnostic
    start: int
    end: int
    text: str
    whole: bool = True


@dataclass(frozen=True)
class Failure:
    """Where reading stopped: what stands there and what could have."""

    start: int
    end: int
    shown: str
    accepts: Set[str]
    stack: list[Any]
    is_token: bool


def instead(
    found: re.Match[str], message: str, help: str | None, text: str, patched: Patched
) -> Correction:
    """Return that `text` should stand in the place of what was found."""
    span = patched.span(found.start(), found.end())
    diagnostic = Diagnostic("syntax-error", message, span, help=help)
    return Correction(diagnostic, found.start(), found.end(), text)


def last(failure: Failure, terminal: str) -> Token | None:
    """Return the token before the failure if it is of this kind."""
    before: Any = failure.stack[-1] if failure.stack else None
    return before if isinstance(before, Token) and before.type == terminal else None
