"""Lark's parse tree to the syntax tree: statements and selectors.

One method per grammar rule, of the rule's name; children come first, so that each method sees
syntax nodes and tokens only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lark import Token, Tree, v_args

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec import expressions as e
from lora_fx.spec import syntax as s
from lora_fx.spec.expression_builder import ExpressionBuilder
from lora_fx.spec.selectors import Atom, Range, Selector

_LOGIC = {"conditional", "or_", "and_", "not_", "comparison"}
_NESTING = _LOGIC | {"sum", "product", "negative", "call", "keyword", "array", "parenthesis"}
_MOST_NESTED = 50
_MOST_OPERANDS = 500


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
class _Builder(ExpressionBuilder):
    def start(self, meta: Any, parts: list[Any]) -> s.File:
        header, *statements = parts
        return s.File(header, tuple(statements))

    def header(self, meta: Any, parts: list[Any]) -> s.Header:
        return s.Header(self._integer(parts[1]), self._span(meta))

    # statements

    def include(self, meta: Any, parts: list[Any]) -> s.Include:
        return s.Include(self._name(parts[1]), self._span(meta))

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

    def drop(self, meta: Any, parts: list[Any]) -> s.Drop:
        return s.Drop(tuple(parts[1:]), self._span(meta))

    def quantize(self, meta: Any, parts: list[Any]) -> s.Quantize:
        span = replace(self._token_span(parts[0]), end=parts[1].span.end)
        return s.Quantize(parts[1], parts[2], span)

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
        span = replace(self._token_span(keyword), end=selector.span.end)
        return s.Target(selector, block[0] if block else (), optional, span)

    def train(self, meta: Any, parts: list[Any]) -> s.Train:
        return s.Train(parts[-1], len(parts) > 2, self._span(meta))

    def tokens(self, meta: Any, parts: list[Any]) -> s.Tokens:
        atom = parts[-1] if isinstance(parts[-1], Atom) else None
        return s.Tokens(parts[1], atom, self._span(meta))

    def optimizer(self, meta: Any, parts: list[Any]) -> s.Optimizer:
        return s.Optimizer(parts[1], self._token_span(parts[0]))

    def entry(self, meta: Any, parts: list[Any]) -> s.Entry:
        return s.Entry(self._name(parts[1]), parts[2], self._between(parts[0], parts[1]))

    def compile(self, meta: Any, parts: list[Any]) -> s.Compile:
        return s.Compile(tuple(parts[1:]), self._token_span(parts[0]))

    def check(self, meta: Any, parts: list[Any]) -> s.Check:
        message = self._text(parts[2]) if len(parts) > 2 else None
        return s.Check(parts[1], message, self._span(meta))

    def block(self, meta: Any, parts: list[Any]) -> s.Attributes:
        return tuple(parts)

    def attribute(self, meta: Any, parts: list[Any]) -> s.Attribute:
        return s.Attribute(self._name(parts[0]), parts[1], self._span(meta))

    # routes and merges

    def route(self, meta: Any, parts: list[Any]) -> s.Route:
        return s.Route(tuple(parts[1:]), self._token_span(parts[0]))

    def when(self, meta: Any, parts: list[Any]) -> s.When:
        return s.When(self._name(parts[1]), parts[2], self._span(meta))

    def otherwise(self, meta: Any, parts: list[Any]) -> s.Otherwise:
        return s.Otherwise(parts[1], self._span(meta))

    def merge(self, meta: Any, parts: list[Any]) -> s.Merge:
        keyword, name, *items = parts
        return s.Merge(self._name(name), tuple(items), self._between(keyword, name))

    def from_(self, meta: Any, parts: list[Any]) -> s.From:
        return s.From(parts[1], self._span(meta))

    def mix(self, meta: Any, parts: list[Any]) -> s.Mix:
        terms: list[s.Term] = []
        sign = "+"
        for part in parts:
            if isinstance(part, Token):
                sign = str(part)
            else:
                terms.append(replace(part, sign=sign))
                sign = "+"
        return s.Mix(tuple(terms), self._span(meta))

    def term(self, meta: Any, parts: list[Any]) -> s.Term:
        weight = parts[0] if len(parts) > 1 else None
        return s.Term("+", weight, self._name(parts[-1]))

    def weight(self, meta: Any, parts: list[Any]) -> e.Expr:
        part = parts[0]
        if not isinstance(part, Token):
            return part
        kinds = {"INT": self.integer, "FLOAT": self.decimal, "PERCENT": self.percent}
        return kinds.get(part.type, self.reference)(meta, parts)

    # selectors

    def selector(self, meta: Any, parts: list[Any]) -> Selector:
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

    def by_class(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("class", self._text(parts[1]), self._span(meta))

    def by_regex(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("regex", self._text(parts[1]), self._span(meta))

    def by_parameter(self, meta: Any, parts: list[Any]) -> Atom:
        return Atom("parameter", self._text(parts[1]), self._span(meta))

    def except_(self, meta: Any, parts: list[Any]) -> _Except:
        return _Except(tuple(parts[1:]))

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
