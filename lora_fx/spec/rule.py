"""The values that one attribute may have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from lora_fx.spec.expressions import Value, Word


@dataclass(frozen=True)
class Rule:
    """The values of one attribute: `words` are the bare words among them, with their parameters.

    `default` is None where nothing stands for what is not set; then `required` says whether
    something must be. `json` is the JSON Schema of the accepted values that are no words.
    """

    expects: str
    default: Value | None
    accepts: Callable[[Value], bool] = lambda value: False
    words: Mapping[str, "Mapping[str, Rule]"] = field(default_factory=dict)
    required: bool = False
    json: Mapping[str, Any] | None = None


Rules = Mapping[str, Rule]


def completed(rule: Rule, value: Value) -> Value:
    """Return an accepted value with every argument of a word in place, by name."""
    if not isinstance(value, Word):
        return value
    parameters = rule.words[value.name]
    given = named_arguments(parameters, value)
    names = (name for name, of in parameters.items() if name in given or of.default is not None)
    filled = ((name, given.get(name, parameters[name].default)) for name in names)
    return replace(value, arguments=tuple((name, v) for name, v in filled if v is not None))


def named_arguments(parameters: Rules, word: Word) -> dict[str, Value]:
    """Return the arguments by name; those without a name take the parameters in their order."""
    order = iter(parameters)
    return {name or next(order, ""): value for name, value in word.arguments}


def number(value: Value) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def whole(smallest: int, default: int | None = None, required: bool = False) -> Rule:
    """Accept whole numbers from `smallest` on."""
    return Rule(
        f"a whole number of at least {smallest}",
        default,
        lambda v: type(v) is int and v >= smallest,
        required=required,
        json={"type": "integer", "minimum": smallest},
    )


def positive(default: float | None = None, required: bool = False) -> Rule:
    """Accept numbers above zero."""

    def accepts(value: Value) -> bool:
        return number(value) and value > 0  # type: ignore[operator]

    json = {"type": "number", "exclusiveMinimum": 0}
    return Rule("a number above 0", default, accepts, required=required, json=json)


def at_least_zero(default: float | None = None) -> Rule:
    """Accept numbers from zero on."""

    def accepts(value: Value) -> bool:
        return number(value) and value >= 0  # type: ignore[operator]

    json = {"type": "number", "minimum": 0}
    return Rule("a number of at least 0", default, accepts, json=json)


def share(default: float | None = None, required: bool = False) -> Rule:
    """Accept numbers from zero to one."""

    def accepts(value: Value) -> bool:
        return number(value) and 0 <= value <= 1  # type: ignore[operator]

    json = {"type": "number", "minimum": 0, "maximum": 1}
    return Rule("a number from 0 to 1", default, accepts, required=required, json=json)


def truth(default: bool | None = None) -> Rule:
    """Accept `true` and `false`."""
    json = {"type": "boolean"}
    return Rule("`true` or `false`", default, lambda value: isinstance(value, bool), json=json)


def text(default: str | None = None, required: bool = False) -> Rule:
    """Accept any text but the empty one."""
    return Rule(
        "a text",
        default,
        lambda v: isinstance(v, str) and bool(v),
        required=required,
        json=json_text({"minLength": 1}),
    )


def json_text(which: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of a text: a string of the language in its JSON form."""
    return {
        "type": "object",
        "properties": {"text": {"type": "string", **which}},
        "required": ["text"],
        "additionalProperties": False,
    }


def list_of(what: str, holds: Callable[[Value], bool], required: bool = False) -> Rule:
    """Accept lists, not empty, of what `holds`."""
    return Rule(
        f"a list of {what}",
        None,
        lambda v: isinstance(v, tuple) and bool(v) and all(map(holds, v)),
        required=required,
    )


def words(
    known: Mapping[str, Rules] | tuple[str, ...], default: str | None, required: bool = False
) -> Rule:
    """Accept these bare words; a mapping gives their parameters."""
    table = known if isinstance(known, Mapping) else {key: {} for key in known}
    value = None if default is None else Word(default)
    return Rule(listed([f"`{word}`" for word in table]), value, words=table, required=required)


def listed(names: list[str]) -> str:
    """Join alternatives: `a, b or c`."""
    return ", ".join(names[:-1]) + f" or {names[-1]}" if len(names) > 1 else names[0]
