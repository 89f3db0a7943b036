"""Diagnostics as SARIF 2.1.0, for code scanning and editors.

Static Analysis Results Interchange Format, OASIS Standard, 27 March 2020. Paragraphs below are
those of its text.
"""

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_fx.diagnostics.diagnostic import Diagnostic
from lora_fx.diagnostics.pages import page
from lora_fx.diagnostics.source import Span

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def to_sarif(diagnostics: Iterable[Diagnostic]) -> dict[str, Any]:
    """Return a log of one run; each code that occurs is a rule, with its page as help."""
    found = list(diagnostics)
    codes = sorted({diagnostic.code for diagnostic in found})
    driver = {
        "name": "lora_fx",
        "version": version("lora_fx"),
        "rules": [_rule(code) for code in codes],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(diagnostic, codes) for diagnostic in found],
    }
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(code: str) -> dict[str, Any]:
    explained = page(code)
    return {
        "id": code,
        "shortDescription": {"text": explained.summary},
        "help": {"text": explained.text, "markdown": explained.text},
    }


def _result(diagnostic: Diagnostic, codes: Sequence[str]) -> dict[str, Any]:
    """Severities have the names of SARIF's levels (3.27.10)."""
    result: dict[str, Any] = {
        "ruleId": diagnostic.code,
        "ruleIndex": codes.index(diagnostic.code),
        "level": diagnostic.severity,
        "message": {"text": _message(diagnostic)},
        "locations": [_location(diagnostic.span, diagnostic.label)] if diagnostic.span else [],
    }
    if diagnostic.secondary:
        result["relatedLocations"] = [
            {"id": i} | _location(span, label)
            for i, (span, label) in enumerate(diagnostic.secondary)
        ]
    return result


def _message(diagnostic: Diagnostic) -> str:
    """All that is said: viewers show little else."""
    label = f": {diagnostic.label}" if diagnostic.label else ""
    lines = [f"{diagnostic.message}{label}", *(f"note: {note}" for note in diagnostic.notes)]
    if diagnostic.help:
        lines.append(f"help: {diagnostic.help}")
    return "\n".join(lines)


def _location(span: Span, label: str) -> dict[str, Any]:
    region = {
        "startLine": span.line,
        "startColumn": span.column,
        "endLine": span.last_line,
        "endColumn": span.end_column,
        "charOffset": span.start,
        "charLength": span.end - span.start,
    }
    place = {"artifactLocation": {"uri": _uri(span.source.name)}, "region": region}
    message = {"message": {"text": label}} if label else {}
    return {"physicalLocation": place} | message


def _uri(name: str) -> str:
    """Return the URI of a file (3.4.3); a relative path stays one."""
    path = Path(name)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
