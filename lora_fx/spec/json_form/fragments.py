"""Parts of the language inside strings: each must be one of its kind, and nothing beside it."""

from dataclasses import replace
from typing import Literal

from lora_fx.diagnostics import Diagnostic, Source, Span
from lora_fx.spec import syntax as s
from lora_fx.spec.one_line import one_line
from lora_fx.spec.parser import parse_source

Kind = Literal["expression", "selector", "pattern", "mix"]

_AROUND: dict[Kind, tuple[str, str]] = {
    "expression": ("lora 1 let x = ", ""),
    "selector": ("lora 1 quantize ", " { }"),
    "pattern": ("lora 1 adapter x { tokens [0] in ", " }"),
    "mix": ("lora 1 merge x { from ", " }"),
}
_OF_PARTS = ("duplicate-clause", "expression-too-large", "not-finite")


def fragment_faults(kind: Kind, text: str, place: str) -> list[Diagnostic]:
    """Return what is wrong with a string that is to be an expression or another kind of part."""
    before, after = _AROUND[kind]
    text = one_line(text)
    file, found = parse_source(Source(place, f"{before}{text}{after}"))
    inside = [_inside(diagnostic, Source(place, text), len(before)) for diagnostic in found]
    if file is not None and _is_alone(file) and not found:
        return []
    if inside and all(diagnostic.code in _OF_PARTS for diagnostic in inside):
        return inside
    span = inside[0].span if inside else Span(Source(place, text), 0, len(text))
    message = f"the string must be one {kind}, and nothing else"
    return [Diagnostic("wrong-json", message, span)]


def _is_alone(file: s.File) -> bool:
    if len(file.statements) != 1:
        return False
    statement = file.statements[0]
    return not isinstance(statement, s.Adapter | s.Merge) or len(statement.items) == 1


def _inside(diagnostic: Diagnostic, source: Source, before: int) -> Diagnostic:
    """Move a diagnostic from the text around a string to the string."""

    def moved(span: Span) -> Span:
        start, end = (min(max(at - before, 0), len(source.text)) for at in (span.start, span.end))
        return Span(source, start, end)

    secondary = tuple((moved(span), label) for span, label in diagnostic.secondary)
    return replace(diagnostic, span=diagnostic.span and moved(diagnostic.span), secondary=secondary)
