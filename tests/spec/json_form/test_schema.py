"""The schema says of values what the tables of attributes say."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import COMPILE, ENTRY, LAYERS, MERGE, MODEL, OPTIMIZER, QUANTIZE, ROUTE
from lora_fx.spec.expressions import Value
from lora_fx.spec.json_form.schema import json_schema
from lora_fx.spec.rule import Rule
from tests.spec.json_form.valid import VALIDATOR

BLOCKS = (MODEL, LAYERS, QUANTIZE, ADAPTER, ROUTE, MERGE, OPTIMIZER, COMPILE, ENTRY)
TABLES = {f"{i}.{name}": rule for i, table in enumerate(BLOCKS) for name, rule in table.items()}
SAMPLES: list[tuple[Any, Value]] = [
    *((x, x) for x in (True, False, -1, 0, 1, 2, 64, -0.5, 0.5, 1.5, 1e9 + 0.5)),
    *(({"text": x}, x) for x in ("", "max-autotune", "anything")),
    ([0.9, 0.99], (0.9, 0.99)),
    ([0.9, 1], (0.9, 1)),
    ([0.9], (0.9,)),
    ([], ()),
]


def valid(data: Any) -> bool:
    return VALIDATOR.is_valid({"lora": 1, **data})


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("rule", TABLES.values(), ids=TABLES)
def test_values_that_are_no_words(rule: Rule) -> None:
    assert rule.json is not None or rule.words
    schema = Draft202012Validator(rule.json or {"not": {}})
    for data, value in SAMPLES:
        assert schema.is_valid(data) == rule.accepts(value), data


@pytest.mark.parametrize(
    "data",
    [
        {"adaptors": {}},
        {"adapters": {"a": {"rnk": 8}}},
        {"adapters": {"a": {"rank": 0}}},
        {"adapters": {"a": {"rank": {"text": "8"}}}},
        {"adapters": {"a": {"targets": "linear"}}},
        {"adapters": {"a": {"targets": [{"rank": 8}]}}},
        {"presets": {"a b": {}}},
        {"let": {"x": None}},
        {"quantize": [{"select": "linear"}]},
        {"optimizer": {"name": "adamw"}},
        {"compile": {"mode": {"text": "fast"}}},
        {"compile": {"entries": {"serve": {"batch": 1, "sequence": 1}}}},
        {"layers": {"replicate": ["4-8"]}},
        {"checks": [{"message": "x"}]},
    ],
)
def test_what_is_not_of_the_form(data: Any) -> None:
    assert not valid(data)


def test_what_is() -> None:
    assert valid({})
    assert valid({"let": {"x": [1, [{"text": ""}], "a"]}, "checks": [True, "sites > 3"]})
    assert valid({"adapters": {"a": {"rank": "2 * x", "weights": "folder", "dropout": 0}}})


def test_words_and_defaults_are_shown() -> None:
    settings = json_schema()["$defs"]["settings"]["properties"]
    assert settings["rank"] == {
        "description": "a whole number of at least 1",
        "anyOf": [{"type": "integer", "minimum": 1}, {"$ref": "#/$defs/expression"}],
        "default": 8,
    }
    assert settings["variant"]["anyOf"][0] == {
        "enum": ["lora", "dora", "velora", "kasa", "bdlora", "monteclora"]  # alora needs tokens
    }
    assert settings["variant"]["default"] == "lora"
    assert "default" not in settings["weights"]
