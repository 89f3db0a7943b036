"""Lark's parse tree of an expression to the expression.

One method per grammar rule, of the rule's name; children come first, so that each method sees
expressions and tokens only. Spans come from `place`, which maps offsets of the parsed text.
"""

import re
from collections.abc import Callable
from typing import Any

from lark import Token, Transformer, v_args

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec import expressions as e
from lora_fx.spec import syntax as s

_MOST_DIGITS = 18


class ExpressionBuilder(Transformer[Token, Any]):
    """Build expressions; `diagnostics` is what is wrong with single tokens."""

    def __init__(self, place: Callable[[int, int], Span]) -> None:
        super().__init__()
        self._place = place
        self.diagnostics: list[Diagnostic] = []

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


v_args(meta=True)(ExpressionBuilder)  # not as a decorator: that would hide the class's type
