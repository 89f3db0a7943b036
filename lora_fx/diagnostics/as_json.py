"""Diagnostics as JSON, for programs that read them."""

from collections.abc import Iterable
from typing import Any

from lora_fx.diagnostics.diagnostic import Diagnostic
from lora_fx.diagnostics.source import Span


def to_json(diagnostics: Iterable[Diagnostic]) -> dict[str, Any]:
    """Return a document of them, in their order.

    Lines and columns count from 1, offsets from 0, all of them in characters (code points) of the
    text with line feeds at its line ends; an end is behind the last character. What has no place
    has `span` null.
    """
    return {"diagnostics": [_diagnostic(diagnostic) for diagnostic in diagnostics]}


def _diagnostic(diagnostic: Diagnostic) -> dict[str, Any]:
    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "label": diagnostic.label,
        "span": _span(diagnostic.span) if diagnostic.span else None,
        "secondary": [
            {"label": label, "span": _span(span)} for span, label in diagnostic.secondary
        ],
        "notes": list(diagnostic.notes),
        "help": diagnostic.help,
    }


def _span(span: Span) -> dict[str, Any]:
    return {
        "file": span.source.name,
        "start": {"line": span.line, "column": span.column, "offset": span.start},
        "end": {"line": span.last_line, "column": span.end_column, "offset": span.end},
    }
