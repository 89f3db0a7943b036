"""What a spec means, without where it says so."""

from dataclasses import fields, is_dataclass
from typing import Any

from lora_fx.diagnostics import Span
from lora_fx.spec.spec import Spec


def meaning(spec: Spec) -> dict[str, Any]:
    """The spec without spans, source and syntax tree."""
    unplaced = _unplaced(spec)
    return {k: v for k, v in unplaced.items() if k not in ("source", "path", "syntax")}


def _unplaced(value: Any) -> Any:
    if isinstance(value, Span):
        return None
    if is_dataclass(value):
        named = {field.name: _unplaced(getattr(value, field.name)) for field in fields(value)}
        return {"": type(value).__name__, **named}
    if isinstance(value, dict):
        return {key: _unplaced(inner) for key, inner in value.items()}
    return [_unplaced(inner) for inner in value] if isinstance(value, tuple) else value
