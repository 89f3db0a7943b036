"""Lark's parse tree to the syntax tree.

One method per grammar rule, of the rule's name; children come first, so that each method sees
syntax nodes and tokens only. Spans come from `place`, which maps offsets of the parsed text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lark import Token, Transformer, Tree, v_args

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec import expressions as e
from lora_fx.spec import syntax as s
from lora_fx.spec.selectors import Atom, Range, Selector

_LOGIC = {"conditional", "or_", "and_", "not_", "comparison"}
_NESTING = _LOGIC | {"sum", "product", "negative", "call", "keyword", "array", "parenthesis"}
_MOST_NESTED = 50
_MOST_OPERANDS = 500
_MOST_DIGITS = 18


def oversized(tree: Tree[Any]) -> Tree[Any] | None:
    """Return an expression nested too deeply, or too long, to be worked on; None if there is none.

    Looks without recursion, so that whatever does recurse may rely on it.
    """
    waiting = [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        if node.data in _NESTING:
            depth += 1
            if depth > _MOST_NESTED or len(node.children) > 2 * _MOST_OPERANDS:
                return node
        waiting += [(child, depth) for child in node.children if isinstance(child, Tree)]
    return None


def build(tree: Tree[Any], place: Callable[[int, int], Span]) -> tuple[s.File, list[Diagnostic]]:
    """Return the syntax tree, and what is wrong with single tokens."""
    builder = _Builder(place)
    return builder.transform(tree), builder.diagnostics


@dataclass(frozen=True)
class _Except:
    atoms: tuple[Atom, ...]


@dataclass(frozen=True)
class _InLayers:
    ranges: tuple[Range, ...]
    stack: str | None
    span: Span


@v_args(meta=True)
class _Builder(Transformer[Token, Any]):
    def __init__(self, place: Callable[[int, int], Span]) -> None:
        super().__init__()
        self._place = place
        self.diagnostics: list[Diagnostic] = []

    def start(self, meta: Any, parts: list[Any]) -> s.File:
        header, *statements = parts
        return s.File(header, tuple(statements))

    def header(self, meta: Any, parts: list[Any]) -> s.Header:
        return s.Header(self._integer(parts[1]), self._span(meta))

    # statements

    def let(self, meta: Any, parts: list[Any]) -> s.Let:
        return s.Let(self._name(parts[1]), parts[2], self._span(meta))

    def model(self, meta: Any, parts: list[Any]) -> s.Model:
        keyword, path, *block = parts
        span = self._between(keyword, path)
        return s.Model(self._name(path), block[0] if block else (), span)

    def layers(self, meta: Any, parts: list[Any]) -> s.Layers:
        return s.Layers(tuple(parts[1:]), self._token_span(parts[0]))

    def replicate(self, meta: Any, parts: list[Any]) -> s.Replicate:
        return s.Replicate(tuple(parts[1:]), self._span(meta))

    def preset(self, meta: Any, parts: list[Any]) -> s.Preset:
        return s.Preset(self._name(parts[1]), parts[2], self._between(parts[0], parts[1]))

    def adapter(self, meta: Any, parts: list[Any]) -> s.Adapter:
        keyword, name, *items = parts
        return s.Adapter(self._name(name), tuple(items), self._between(keyword, name))

    def use(self, meta: Any, parts: list[Any]) -> s.Use:
        return s.Use(self._name(parts[1]), self._span(meta))

    def target(self, meta: Any, parts: list[Any]) -> s.Target:
        keyword, *rest = parts
        optional = isinstance(rest[0], Token)
        selector, *block = rest[1:] if optional else rest
        start = self._token_span(keyword)
        span = Span(start.source, start.start, selector.span.end)
        return s.Target(selector, block[0] if block else (), optional, span)

    def compile(self, meta: Any, parts: list[Any]) -> s.Compile:
        return s.Compile(tuple(parts[1:]), self._token_span(parts[0]))

    def check(self, meta: Any, parts: list[Any]) -> s.Check:
        message = self._text(parts[2]) if len(parts) > 2 else None
        return s.Check(parts[1], message, self._span(meta))

    def block(self, meta: Any, parts: list[Any]) -> s.Attributes:
        return tuple(parts)

    def attribute(self, meta: Any, parts: list[Any]) -> s.Attribute:
        return s.Attribute(self._name(parts[0]), parts[1], self._span(meta))

    # statements of later versions

    def _unsupported(self, meta: Any, parts: list[Any]) -> s.Unsupported:
        return s.Unsupported(str(parts[0]), self._token_span(parts[0]))

    include = quantize = route = merge = optimizer = _unsupported
    drop = train = tokens = entry = _unsupported

    def _ignored(self, meta: Any, parts: list[Any]) -> None:
        """Belongs to a statement that is refused as a whole."""

    when = otherwise = from_ = mix = term = weight = _ignored

    # selectors

    def selector(self, meta: Any, parts: list[Any]) -> Selector | s.Unsupported:
        for part in parts:
            if isinstance(part, s.Unsupported):
                return part
        layers = [part for part in parts if isinstance(part, _InLayers)]
        for again in layers[1:]:
            self.diagnostics.append(
                Diagnostic(
                    "duplicate-clause",
                    "a selector has one `in layers` at most",
                    again.span,
                    secondary=((layers[0].span, "the first one"),),
                    help="list all ranges in one: `in layers[0..4, 8..12]`",
                )
            )
        return Selector(
            tuple(part for part in parts if isinstance(part, Atom)),
            tuple(a for part in parts if isinstance(part, _Except) for a in part.atoms),
            layers[0].ranges if layers else None,
            layers[0].stack if layers else None,
            tuple(part for part in parts if isinstance(part, e.Expr)),
            self._span(meta),
        )

    def by_name(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("name", str(parts[0]), self._span(meta))

    def by_glob(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("glob", self._text(parts[0]), self._span(meta))

    def all_linear(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("linear", "linear", self._span(meta))

    by_class = by_regex = by_parameter = _unsupported

    def except_(self, meta: Any, parts: list[Any]) -> _Except | s.Unsupported:
        refused = [part for part in parts if isinstance(part, s.Unsupported)]
        return refused[0] if refused else _Except(tuple(parts[1:]))

    def in_layers(self, meta: Any, parts: list[Any]) -> _InLayers:
        quoted = [part for part in parts if isinstance(part, Token) and part.type == "STRING"]
        ranges = tuple(part for part in parts if isinstance(part, Range))
        stack = self._text(quoted[0]) if quoted else None
        return _InLayers(ranges, stack, self._span(meta))

    def where(self, meta: Any, parts: list[Any]) -> e.Expr:
        return parts[1]

    def one_layer(self, meta: Any, parts: list[Any]) -> Range:
        first = self._integer(parts[0])
        return Range(first, first + 1, self._span(meta))

    def from_layer(self, meta: Any, parts: list[Any]) -> Range:
        return Range(self._integer(parts[0]), None, self._span(meta))

    def to_layer(self, meta: Any, parts: list[Any]) -> Range:
        return Range(None, self._integer(parts[0]), self._span(meta))

    def layer_range(self, meta: Any, parts: list[Any]) -> Range:
        return Range(self._integer(parts[0]), self._integer(parts[1]), self._span(meta))

    # expressions

    def conditional(self, meta: Any, parts: list[Any]) -> e.Conditional:
        return e.Conditional(parts[1], parts[3], parts[5], self._span(meta))

    def _logical(self, meta: Any, parts: list[Any]) -> e.Logical:
        return e.Logical(str(parts[1]), tuple(parts[::2]), self._span(meta))

    or_ = and_ = _logical

    def not_(self, meta: Any, parts: list[Any]) -> e.Not:
        return e.Not(parts[1], self._span(meta))

    def comparison(self, meta: Any, parts: list[Any]) -> e.Comparison:
        return e.Comparison(str(parts[1]), parts[0], parts[2], self._span(meta))

    def _arithmetic(self, meta: Any, parts: list[Any]) -> e.Arithmetic:
        operators = (str(operator) for operator in parts[1::2])
        rest = tuple(zip(operators, parts[2::2], strict=True))
        return e.Arithmetic(parts[0], rest, self._span(meta))

    sum = product = _arithmetic

    def negative(self, meta: Any, parts: list[Any]) -> e.Negative:
        return e.Negative(parts[0], self._span(meta))

    def integer(self, meta: Any, parts: list[Any]) -> e.Literal:
        return e.Literal(self._integer(parts[0]), self._span(meta))

    def decimal(self, meta: Any, parts: list[Any]) -> e.Literal:
        return e.Literal(self._decimal(parts[0], str(parts[0])), self._span(meta))

    def percent(self, meta: Any, parts: list[Any]) -> e.Literal:
        number = self._decimal(parts[0], str(parts[0]).removesuffix("%"))
        return e.Literal(number / 100, self._span(meta))

    def string(self, meta: Any, parts: list[Any]) -> e.Literal:
        return e.Literal(self._text(parts[0]), self._span(meta))

    def true(self, meta: Any, parts: list[Any]) -> e.Literal:
        return e.Literal(True, self._span(meta))

    def false(self, meta: Any, parts: list[Any]) -> e.Literal:
        return e.Literal(False, self._span(meta))

    def reference(self, meta: Any, parts: list[Any]) -> e.Reference:
        return e.Reference(tuple(str(part) for part in parts), self._span(meta))

    def call(self, meta: Any, parts: list[Any]) -> e.Call:
        return e.Call(str(parts[0]), tuple(parts[1:]), self._span(meta))

    def keyword(self, meta: Any, parts: list[Any]) -> e.Keyword:
        return e.Keyword(str(parts[0]), parts[1], self._span(meta))

    def array(self, meta: Any, parts: list[Any]) -> e.Array:
        return e.Array(tuple(parts), self._span(meta))

    def parenthesis(self, meta: Any, parts: list[Any]) -> e.Expr:
        return parts[0]

    # tokens

    def _span(self, meta: Any) -> Span:
        return self._place(meta.start_pos, meta.end_pos)

    def _token_span(self, token: Token) -> Span:
        return self._between(token, token)

    def _between(self, first: Token, last: Token) -> Span:
        return self._place(first.start_pos or 0, last.end_pos or 0)

    def _name(self, token: Token) -> s.Name:
        text = self._text(token) if token.type == "STRING" else str(token)
        return s.Name(text, self._token_span(token))

    def _text(self, token: Token) -> str:
        """Take off the quotes; a backslash counts only before a quote or a backslash."""
        return re.sub(r'\\(["\\])', r"\1", token[1:-1])

    def _integer(self, token: Token) -> int:
        if len(token) <= _MOST_DIGITS:
            return int(token)
        self._too_large(token)
        return 1

    def _decimal(self, token: Token, digits: str) -> float:
        number = float(digits)
        if number == float("inf"):
            self._too_large(token)
            return 1.0
        return number

    def _too_large(self, token: Token) -> None:
        span = self._token_span(token)
        self.diagnostics.append(Diagnostic("not-finite", "the number is too large", span))
