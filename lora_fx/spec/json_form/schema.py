"""The JSON Schema of the JSON form, made from the tables of attributes."""

from collections.abc import Iterable
from typing import Any

from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import (
    COMPILE,
    ENTRIES,
    ENTRY,
    LAYERS,
    MERGE,
    MODEL,
    OPTIMIZER,
    QUANTIZE,
    ROUTE,
)
from lora_fx.spec.expressions import Value, Word, show
from lora_fx.spec.rule import Rule, Rules, json_text

Schema = dict[str, Any]

_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"
_LINE = {"type": "string", "pattern": "^[^\\n\\r]*$"}
_RANGES = r"^([0-9]+|[0-9]+\.\.|\.\.[0-9]+|[0-9]+\.\.[0-9]+)$"


def json_schema() -> Schema:
    """Return the schema, in draft 2020-12, of what `Spec.to_json` makes and `parse` reads.

    It holds the form, the names, and the values as far as they are no expressions; what only the
    whole spec tells is `parse`'s to find.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A spec of lora_fx",
        **_object(_statements(), ["lora"]),
        "$defs": _definitions(),
    }


def _statements() -> Schema:
    entry = _object(_attributes(ENTRY), _required(ENTRY))
    return {
        "lora": {"const": 1, "description": "the version of the language"},
        "include": _list({"type": "string", "description": "a file, relative to this one"}),
        "let": _named(_ref("value"), _NAME),
        "model": _or_its_key("path", {"path": _LINE, **_attributes(MODEL)}),
        "layers": _object(
            {"replicate": _ref("ranges"), "drop": _ref("ranges"), **_attributes(LAYERS)}
        ),
        "quantize": _list(
            _object(
                {"select": _ref("selector"), **_attributes(QUANTIZE)},
                ["select", *_required(QUANTIZE)],
            )
        ),
        "presets": _named(_ref("settings"), _NAME),
        "adapters": _named(_ref("adapter")),
        "route": _object(
            {"when": _named(_ref("mix")), "default": _ref("mix"), **_attributes(ROUTE)}
        ),
        "merges": _named(_object({"from": _ref("mix"), **_attributes(MERGE)}, ["from"])),
        "optimizer": _object(_attributes(OPTIMIZER), _required(OPTIMIZER)),
        "checks": _list(_ref("check")),
        "compile": _object(
            {"entries": _object(dict.fromkeys(ENTRIES, entry)), **_attributes(COMPILE)}
        ),
    }


def _definitions() -> Schema:
    selected = {"select": _ref("selector"), "optional": {"type": "boolean", "default": False}}
    ids = {"anyOf": [{"type": "integer", "minimum": 0}, _ref("expression")]}
    condition = {"anyOf": [{"type": "boolean"}, _ref("expression")]}
    adapter = {
        "use": _list({"anyOf": [{"type": "string", "pattern": _NAME}, _ref("settings")]}),
        "targets": _list(_or_its_key("select", {**selected, **_attributes(ADAPTER)})),
        "train": _list(_or_its_key("select", selected)),
        "tokens": _list(_or_its_key("ids", {"ids": _list(ids), "in": _ref("selector")})),
    }
    return {
        "expression": _string("an expression of the language: `2 * rank`, `rslora`"),
        "selector": _string('which modules: `linear except down_proj`, `"model.layers.*.mlp"`'),
        "mix": _string("a weighted sum of adapters: `0.7 * legal + 0.3 * style`"),
        "ranges": _list({"anyOf": [_range(), {"type": "integer", "minimum": 0}]}),
        "text": json_text({}),
        "value": {
            "anyOf": [
                {"type": ["number", "boolean"]},
                _ref("expression"),
                _ref("text"),
                _list(_ref("value")),
            ]
        },
        "settings": _object(_attributes(ADAPTER)),
        "adapter": _object({**adapter, **_attributes(ADAPTER)}),
        "check": {
            "anyOf": [condition, _object({"condition": condition, "message": _LINE}, ["condition"])]
        },
    }


def _attributes(table: Rules) -> Schema:
    return {name: _attribute(rule) for name, rule in table.items()}


def _attribute(rule: Rule) -> Schema:
    """Any value may be an expression; the words that are right alone are listed for editors."""
    alone = [
        word
        for word, parameters in rule.words.items()
        if not any(parameter.required for parameter in parameters.values())
    ]
    forms: list[Any] = [{"enum": alone}] if alone else []
    forms += [dict(rule.json)] if rule.json else []
    default = {} if rule.default is None else {"default": _value(rule.default)}
    return {"description": rule.expects, "anyOf": [*forms, _ref("expression")], **default}


def _value(value: Value) -> Any:
    if isinstance(value, Word):
        return show(value)
    return {"text": value} if isinstance(value, str) else value


def _required(table: Rules) -> list[str]:
    return [name for name, rule in table.items() if rule.required]


def _or_its_key(key: str, properties: Schema) -> Schema:
    return {"anyOf": [properties[key], _object(properties, [key])]}


def _object(properties: Schema, required: Iterable[str] = ()) -> Schema:
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": [*required]} if required else {})


def _named(values: Schema, names: str | None = None) -> Schema:
    names_too = {"propertyNames": {"pattern": names}} if names else {}
    return {"type": "object", "additionalProperties": values, **names_too}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _range() -> Schema:
    return {"type": "string", "pattern": _RANGES, "description": "half-open: `0..4`, `8..`"}


def _string(description: str) -> Schema:
    return {"type": "string", "minLength": 1, "description": description}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
