"""The value of an expression. Numbers are whole or finite; everything is checked, nothing cast."""

import math
import operator
from collections.abc import Callable, Mapping

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.spec.expressions import (
    Arithmetic,
    Array,
    Call,
    Comparison,
    Conditional,
    Expr,
    Keyword,
    Literal,
    Logical,
    Negative,
    Not,
    Reference,
    Value,
    Word,
    show,
)

Number = int | float
Environment = Callable[[Reference], Value]

FUNCTIONS: Mapping[str, tuple[int, int | None]] = {
    "min": (1, None),
    "max": (1, None),
    "round": (1, 1),
    "sqrt": (1, 1),
}
_LARGEST = 2**63
_MOST_PARTS = 2000
_ORDER: Mapping[str, Callable[[Number, Number], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def evaluate(expr: Expr, environment: Environment) -> Value:
    """Return the value of `expr`; `environment` gives the values of dotted names.

    Of a conditional only the chosen branch is evaluated, of `and` and `or` only what decides.
    Whole numbers stay whole: `/` gives one where it divides without remainder. Raises LoraFxError
    at the part that has no value: wrong types, division by zero, numbers that are not finite.
    """
    match expr:
        case Literal():
            return expr.value
        case Reference():
            return environment(expr)
        case Conditional():
            chosen = evaluate_condition(expr.condition, environment)
            return evaluate(expr.positive if chosen else expr.negative, environment)
        case Logical():
            decisive = expr.operator == "or"
            truths = (evaluate_condition(operand, environment) for operand in expr.operands)
            return decisive if any(truth is decisive for truth in truths) else not decisive
        case Not():
            return not evaluate_condition(expr.operand, environment)
        case Comparison():
            return _compare(expr, environment)
        case Array():
            items = tuple(evaluate(item, environment) for item in expr.items)
            return _bounded(items, expr.span)
        case Call() if expr.function not in FUNCTIONS:
            arguments = tuple(_argument(a, environment) for a in expr.arguments)
            return _bounded(Word(expr.function, arguments), expr.span)
        case _:
            return _finite(_number(expr, environment), expr.span)


def _argument(argument: Expr | Keyword, environment: Environment) -> tuple[str, Value]:
    if isinstance(argument, Keyword):
        return argument.name, evaluate(argument.value, environment)
    return "", evaluate(argument, environment)


def _number(expr: Arithmetic | Negative | Call, environment: Environment) -> Number:
    match expr:
        case Negative():
            return -_operand(expr.operand, environment)
        case Arithmetic():
            value = _operand(expr.first, environment)
            for sign, part in expr.rest:
                value = _apply(sign, value, _operand(part, environment), part.span)
                value = _finite(value, expr.span)
            return value
        case Call():
            arguments = [
                _operand(argument, environment)
                for argument in expr.arguments
                if not isinstance(argument, Keyword)
            ]
            return _call(expr, arguments)


def _apply(sign: str, left: Number, right: Number, span: Span) -> Number:
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    if right == 0:
        raise _fault("division-by-zero", "the divisor is zero", span)
    if isinstance(left, int) and isinstance(right, int) and left % right == 0:
        return left // right
    return left / right


def _call(expr: Call, arguments: list[Number]) -> Number:
    match expr.function:
        case "min":
            return min(arguments)
        case "max":
            return max(arguments)
        case "round":
            return round(arguments[0])
        case "sqrt" if arguments[0] >= 0:
            return math.sqrt(arguments[0])
        case _:
            label = f"is {show(arguments[0])}"
            raise _fault("not-finite", "a negative number has no root", expr.span, label)


def _compare(expr: Comparison, environment: Environment) -> bool:
    left, right = evaluate(expr.left, environment), evaluate(expr.right, environment)
    if expr.operator in _ORDER:
        numbers = (_as_number(left, expr.left.span), _as_number(right, expr.right.span))
        return _ORDER[expr.operator](*numbers)
    if kind(left) != kind(right):
        message = f"{kind(left)} and {kind(right)} cannot be compared"
        raise _fault("wrong-type", message, expr.span, f"{show(left)} and {show(right)}")
    return (left == right) is (expr.operator == "==")


def evaluate_condition(expr: Expr, environment: Environment) -> bool:
    """Return the value of an expression that must be true or false. Raises LoraFxError."""
    value = evaluate(expr, environment)
    if isinstance(value, bool):
        return value
    message = f"expected true or false, found {kind(value)}"
    raise _fault("wrong-type", message, expr.span, f"is {show(value)}")


def _operand(expr: Expr, environment: Environment) -> Number:
    return _as_number(evaluate(expr, environment), expr.span)


def _as_number(value: Value, span: Span) -> Number:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise _fault("wrong-type", f"expected a number, found {kind(value)}", span, f"is {show(value)}")


def _finite(value: Number, span: Span) -> Number:
    if math.isfinite(value) and abs(value) < _LARGEST:
        return value
    raise _fault("not-finite", "the number is too large", span)


def _bounded(value: Value, span: Span) -> Value:
    """Refuse what constants inside constants have blown up, before something walks through it."""
    waiting, parts = [value], 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if parts > _MOST_PARTS:
            message = f"the value has more than {_MOST_PARTS} parts"
            raise _fault("expression-too-large", message, span)
        if isinstance(part, tuple):
            waiting += part
        elif isinstance(part, Word):
            waiting += [argument for _, argument in part.arguments]
    return value


def kind(value: Value) -> str:
    """Return what a value is, with its article."""
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, tuple):
        return "a list"
    return "a text" if isinstance(value, str) else "a word"


def _fault(code: str, message: str, span: Span, label: str = "") -> LoraFxError:
    return LoraFxError((Diagnostic(code, message, span, label),))


def no_environment(reference: Reference) -> Value:
    """Be the environment of an expression without names."""
    raise _fault("unknown-name", f"`{reference}` is not known", reference.span)
