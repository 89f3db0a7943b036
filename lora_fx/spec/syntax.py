"""The syntax tree of a `.lora` file: what is written, in order, not yet what it means."""

from dataclasses import dataclass

from lora_fx.diagnostics import Span
from lora_fx.spec.expressions import Expr
from lora_fx.spec.selectors import Atom, Range, Selector


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
class Attribute:
    """`name = value`."""

    name: Name
    value: Expr
    span: Span


Attributes = tuple[Attribute, ...]


@dataclass(frozen=True)
class Include:
    """`include "file"`."""

    path: Name
    span: Span


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
class Drop:
    """`drop 3..5`."""

    ranges: tuple[Range, ...]
    span: Span


@dataclass(frozen=True)
class Layers:
    """`layers { … }`."""

    items: tuple[Replicate | Drop | Attribute, ...]
    span: Span


@dataclass(frozen=True)
class Quantize:
    """`quantize selector { … }`; the span is that of the statement without its block."""

    selector: Selector
    attributes: Attributes
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

    selector: Selector
    attributes: Attributes
    optional: bool
    span: Span


@dataclass(frozen=True)
class Train:
    """`train[?] selector`."""

    selector: Selector
    optional: bool
    span: Span


@dataclass(frozen=True)
class Tokens:
    """`tokens [ids] in atom`."""

    ids: Expr
    atom: Atom | None
    span: Span


@dataclass(frozen=True)
class Adapter:
    """`adapter name { … }`; the span is that of the first two words."""

    name: Name
    items: tuple[Attribute | Use | Target | Train | Tokens, ...]
    span: Span


@dataclass(frozen=True)
class Term:
    """`- 0.5 * style` inside a mix; without a weight it is 1."""

    sign: str
    weight: Expr | None
    name: Name


@dataclass(frozen=True)
class Mix:
    """`0.7 * legal + 0.3 * style`."""

    terms: tuple[Term, ...]
    span: Span


@dataclass(frozen=True)
class When:
    """`when "name" -> mix`."""

    name: Name
    mix: Mix
    span: Span


@dataclass(frozen=True)
class Otherwise:
    """`default -> mix`."""

    mix: Mix
    span: Span


@dataclass(frozen=True)
class Route:
    """`route { … }`."""

    items: tuple[Attribute | When | Otherwise, ...]
    span: Span


@dataclass(frozen=True)
class From:
    """`from mix`."""

    mix: Mix
    span: Span


@dataclass(frozen=True)
class Merge:
    """`merge name { … }`; the span is that of the first two words."""

    name: Name
    items: tuple[Attribute | From, ...]
    span: Span


@dataclass(frozen=True)
class Optimizer:
    """`optimizer { … }`."""

    attributes: Attributes
    span: Span


@dataclass(frozen=True)
class Entry:
    """`entry name { … }`."""

    name: Name
    attributes: Attributes
    span: Span


@dataclass(frozen=True)
class Compile:
    """`compile { … }`."""

    items: tuple[Attribute | Entry, ...]
    span: Span


@dataclass(frozen=True)
class Check:
    """`check condition : "message"`."""

    condition: Expr
    message: str | None
    span: Span


Statement = (
    Include
    | Let
    | Model
    | Layers
    | Quantize
    | Preset
    | Adapter
    | Route
    | Merge
    | Optimizer
    | Compile
    | Check
)


@dataclass(frozen=True)
class File:
    """A file; not `whole` if a part of it could not be read and is left out."""

    header: Header
    statements: tuple[Statement, ...]
    whole: bool = True
