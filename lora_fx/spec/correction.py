"""Where reading stopped, and how to read on."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from lora_fx.diagnostics import Diagnostic


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
