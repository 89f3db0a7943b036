"""A JSON file as plain data."""

import json
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span


def read_json(source: Source) -> Any:
    """Return what a JSON text holds. Raises LoraFxError if it is none, or names a key twice."""
    try:
        return json.loads(source.text, object_pairs_hook=_once_each)
    except json.JSONDecodeError as error:
        span = Span(source, error.pos, error.pos)
        raise _no_json(f"this is no JSON: {error.msg}", span) from error
    except (ValueError, RecursionError) as error:
        raise _no_json(f"this JSON cannot be read: {error}", Span(source, 0, 0)) from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {json.dumps(key)} stands twice in one object")
        found[key] = value
    return found


def _no_json(message: str, span: Span) -> LoraFxError:
    return LoraFxError([Diagnostic("wrong-json", message, span)])
