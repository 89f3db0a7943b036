"""The syntax tree of a `.lora` file: what is written, in order, not yet what it means."""

from dataclasses import dataclass

from lora_fx.diagnostics import Span
from lora_fx.spec.expressions import Expr
from lora_fx.spec.selectors import Range, Selector


@dataclass(frozen=True)
class Name:
    """A name, or a quoted text, without its quotes."""

    text: str
    span: Span


@dataclass(frozen=True)
class Header:
    """`lora version`."""

    version: int
    span: Span


@dataclass(frozen=True)
class Unsupported:
    """A statement or clause that the language has and this version does not."""

    what: str
    span: Span


@dataclass(frozen=True)
class Attribute:
    """`name = value`."""

    name: Name
    value: Expr
    span: Span


Attributes = tuple[Attribute, ...]


@dataclass(frozen=True)
class Let:
    """`let name = value`."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True)
class Model:
    """`model "path" { … }`."""

    path: Name
    attributes: Attributes
    span: Span


@dataclass(frozen=True)
class Replicate:
    """`replicate 0..24, 8..32`."""

    ranges: tuple[Range, ...]
    span: Span


@dataclass(frozen=True)
class Layers:
    """`layers { … }`."""

    items: tuple[Replicate | Attribute | Unsupported, ...]
    span: Span


@dataclass(frozen=True)
class Preset:
    """`preset name { … }`."""

    name: Name
    attributes: Attributes
    span: Span


@dataclass(frozen=True)
class Use:
    """`use preset`."""

    preset: Name
    span: Span


@dataclass(frozen=True)
class Target:
    """`target[?] selector { … }`; the span is that of the statement without its block."""

    selector: Selector | Unsupported
    attributes: Attributes
    optional: bool
    span: Span


@dataclass(frozen=True)
class Adapter:
    """`adapter name { … }`; the span is that of the first two words."""

    name: Name
    items: tuple[Attribute | Use | Target | Unsupported, ...]
    span: Span


@dataclass(frozen=True)
class Compile:
    """`compile { … }`."""

    items: tuple[Attribute | Unsupported, ...]
    span: Span


@dataclass(frozen=True)
class Check:
    """`check condition : "message"`."""

    condition: Expr
    message: str | None
    span: Span


Statement = Let | Model | Layers | Preset | Adapter | Compile | Check | Unsupported


@dataclass(frozen=True)
class File:
    """A whole file."""

    header: Header
    statements: tuple[Statement, ...]
