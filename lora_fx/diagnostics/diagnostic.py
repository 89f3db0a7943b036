"""What is wrong, where, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lora_fx.diagnostics.source import Span

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """One thing to tell the user: a lower-case sentence, where it holds, and one action.

    `label` stands at the span and gives the actual numbers; `secondary` points at other places
    that take part, in any file. `code` is a slug that never changes; `pages/<code>.md` explains it.
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    secondary: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    help: str | None = None
    severity: Severity = "error"


class LoraFxError(Exception):
    """Everything that is wrong, at once; `str()` shows it as rustc would."""

    __module__ = "lora_fx"  # the name that tracebacks show is the public one

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        from lora_fx.diagnostics.text import render

        return "\n" + render(self.diagnostics)
