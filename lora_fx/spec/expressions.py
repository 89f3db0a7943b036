"""Expressions as data; every node knows where it stands."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lora_fx.diagnostics import Span


@dataclass(frozen=True)
class Word:
    """A bare word of the language that is a value, such as `rslora`, or `loftq(bits = 4)`.

    An argument that is written without a name has the name "".
    """

    name: str
    arguments: "tuple[tuple[str, Value], ...]" = ()

    def argument(self, name: str) -> "Value":
        """Return an argument by name."""
        return dict(self.arguments)[name]


Value = bool | int | float | str | Word | tuple["Value", ...]


@dataclass(frozen=True)
class Literal:
    """A value written down, or a constant in the place of its name."""

    value: Value
    span: Span


@dataclass(frozen=True)
class Reference:
    """A dotted name: `rank`, `layer.index`, `model.config.hidden_size`."""

    parts: tuple[str, ...]
    span: Span

    def __str__(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Negative:
    """`-operand`."""

    operand: "Expr"
    span: Span


@dataclass(frozen=True)
class Arithmetic:
    """`first` and then, from the left, each `(operator, operand)` of `rest`; one of `+ - * /`."""

    first: "Expr"
    rest: tuple[tuple[str, "Expr"], ...]
    span: Span


@dataclass(frozen=True)
class Comparison:
    """`left operator right` with one of `== != < <= > >=`."""

    operator: str
    left: "Expr"
    right: "Expr"
    span: Span


@dataclass(frozen=True)
class Not:
    """`not operand`."""

    operand: "Expr"
    span: Span


@dataclass(frozen=True)
class Logical:
    """Operands joined by `and`, or by `or`; later ones are looked at only if they decide."""

    operator: str
    operands: tuple["Expr", ...]
    span: Span


@dataclass(frozen=True)
class Conditional:
    """`if condition then positive else negative`; only the chosen branch is evaluated."""

    condition: "Expr"
    positive: "Expr"
    negative: "Expr"
    span: Span


@dataclass(frozen=True)
class Keyword:
    """`name = value` inside a call."""

    name: str
    value: "Expr"
    span: Span


@dataclass(frozen=True)
class Call:
    """`function(arguments)`."""

    function: str
    arguments: tuple["Expr | Keyword", ...]
    span: Span


@dataclass(frozen=True)
class Array:
    """`[a, b]`."""

    items: tuple["Expr", ...]
    span: Span


Expr = (
    Literal
    | Reference
    | Negative
    | Arithmetic
    | Comparison
    | Not
    | Logical
    | Conditional
    | Call
    | Array
)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct parts of an expression."""
    match expr:
        case Negative() | Not():
            return (expr.operand,)
        case Arithmetic():
            return (expr.first, *(operand for _, operand in expr.rest))
        case Comparison():
            return (expr.left, expr.right)
        case Logical():
            return expr.operands
        case Conditional():
            return (expr.condition, expr.positive, expr.negative)
        case Call():
            return tuple(a.value if isinstance(a, Keyword) else a for a in expr.arguments)
        case Array():
            return expr.items
        case _:
            return ()


def references(expr: Expr) -> Iterator[Reference]:
    """Yield every dotted name inside an expression, in the order they are written."""
    if isinstance(expr, Reference):
        yield expr
    for child in children(expr):
        yield from references(child)


def results(expr: Expr) -> Iterator[Expr]:
    """Yield each expression that may be the value: the branches of a conditional, else itself."""
    if isinstance(expr, Conditional):
        yield from results(expr.positive)
        yield from results(expr.negative)
    else:
        yield expr


def substitute(expr: Expr, leaf: Callable[[Reference], Expr]) -> Expr:
    """Return the expression with `leaf(reference)` in the place of each dotted name."""
    if isinstance(expr, Reference):
        return leaf(expr)
    return _with_children(expr, tuple(substitute(child, leaf) for child in children(expr)))


def _with_children(expr: Expr, parts: tuple[Expr, ...]) -> Expr:
    match expr:
        case Negative() | Not():
            return replace(expr, operand=parts[0])
        case Arithmetic():
            signs = (sign for sign, _ in expr.rest)
            return Arithmetic(parts[0], tuple(zip(signs, parts[1:], strict=True)), expr.span)
        case Comparison():
            return replace(expr, left=parts[0], right=parts[1])
        case Conditional():
            return replace(expr, condition=parts[0], positive=parts[1], negative=parts[2])
        case Logical():
            return Logical(expr.operator, parts, expr.span)
        case Call():
            pairs = zip(expr.arguments, parts, strict=True)
            return replace(expr, arguments=tuple(_argument(old, new) for old, new in pairs))
        case Array():
            return Array(parts, expr.span)
        case _:
            return expr


def _argument(old: Expr | Keyword, new: Expr) -> Expr | Keyword:
    return replace(old, value=new) if isinstance(old, Keyword) else new


def show(value: object) -> str:
    """Return a value as it is written in the language."""
    match value:
        case bool():
            return "true" if value else "false"
        case Word():
            return value.name + (_show_arguments(value) if value.arguments else "")
        case tuple():
            return f"[{', '.join(map(show, value))}]"
        case str():
            return quote(value)
        case float():
            return repr(value)
        case _:
            return str(value)


def quote(text: str) -> str:
    """Return a text in quotes; a backslash is doubled only where it would count as an escape."""
    escaped = re.sub(r'\\(?=["\\]|\Z)|"', r"\\\g<0>", text)
    return f'"{escaped}"'


def _show_arguments(word: Word) -> str:
    parts = (f"{name} = {show(value)}" if name else show(value) for name, value in word.arguments)
    return f"({', '.join(parts)})"
