from typing import Any

import pytest

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source
from lora_fx.spec import syntax
from lora_fx.spec.evaluate import evaluate
from lora_fx.spec.expressions import Expr, Reference, Value, Word
from lora_fx.spec.parser import parse_source

NAMES: dict[str, Value] = {"a": 7, "b.c": 2.5, "t": True, "s": "text", "w": Word("rslora")}


def expression(text: str) -> Expr:
    file, faults = parse_source(Source("x.lora", f"lora 1 let x = {text}"))
    assert faults == []
    assert file is not None
    (let,) = file.statements
    assert isinstance(let, syntax.Let)
    return let.value


def value(text: str) -> Value:
    return evaluate(expression(text), lambda reference: NAMES[str(reference)])


def fault(text: str) -> Diagnostic:
    with pytest.raises(LoraFxError) as raised:
        value(text)
    (diagnostic,) = raised.value.diagnostics
    return diagnostic


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("2 * 6 / 4", 3),
        ("7 / 2", 3.5),
        ("-a + 1", -6),
        ("--a", 7),
        ("2.5%", 0.025),
        ("200%", 2.0),
        ("2e-4", 0.0002),
        ("1.5e2", 150.0),
        ("min(3, a, 5)", 3),
        ("max(b.c, 2,)", 2.5),
        ("round(2.5)", 2),
        ("round(3.5)", 4),
        ("sqrt(16)", 4.0),
        ("a < 8 and a >= 7", True),
        ("not t or a != 7", False),
        ("not (t and false)", True),
        ("a == 7.0", True),
        ('s == "text"', True),
        ("w == w", True),
        ("t == false", False),
        ("if a < 8 then 1 else 2", 1),
        ("if a < 7 then 1 else if t then 3 else 4", 3),
        ("w", Word("rslora")),
        ("true", True),
    ],
)
def test_values(text: str, result: Any) -> None:
    found = value(text)
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("1 / (a - 7)", "division-by-zero", "(a - 7)"),
        ("1 / 0.0", "division-by-zero", "0.0"),
        ("s + 1", "wrong-type", "s"),
        ("1 + t", "wrong-type", "t"),
        ("-w", "wrong-type", "w"),
        ("a and t", "wrong-type", "a"),
        ("not s", "wrong-type", "s"),
        ("if a then 1 else 2", "wrong-type", "a"),
        ("s < 3", "wrong-type", "s"),
        ("s == w", "wrong-type", "s == w"),
        ("t == 1", "wrong-type", "t == 1"),
        ("[1] + 1", "wrong-type", "[1]"),
        ("[1] < 2", "wrong-type", "[1]"),
        ("sqrt(0 - 1)", "not-finite", "sqrt(0 - 1)"),
        ("1e200 * 1e200", "not-finite", "1e200 * 1e200"),
        ("4000000000 * 4000000000", "not-finite", "4000000000 * 4000000000"),
    ],
)
def test_what_has_no_value(text: str, code: str, place: str) -> None:
    found = fault(text)
    assert found.code == code
    assert found.span is not None
    assert found.span.text in (place, place.strip("()"))


@pytest.mark.parametrize(
    "text",
    ["t or 1 / 0 == 1", "false and s", "if t then 1 else 1 / 0", "if false then s + 1 else 1"],
)
def test_what_does_not_decide_is_not_evaluated(text: str) -> None:
    value(text)


def test_names_are_looked_up_once_per_use() -> None:
    asked: list[str] = []

    def environment(reference: Reference) -> Value:
        asked.append(str(reference))
        return 1

    evaluate(expression("a + b.c * a"), environment)
    assert asked == ["a", "b.c", "a"]


def test_values_inside_values_are_bounded() -> None:
    def grow(times: int) -> Value:
        inner: Value = 1
        for part in ["[a, a]", "word(a, [a])"] * times:
            inner = evaluate(expression(part), lambda _, known=inner: known)
        return inner

    assert grow(2)
    with pytest.raises(LoraFxError) as raised:
        grow(10)
    assert [d.code for d in raised.value.diagnostics] == ["expression-too-large"]
    assert value(f"[{', '.join(['1'] * 400)}]") == (1,) * 400
