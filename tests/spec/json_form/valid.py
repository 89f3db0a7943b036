"""Data held against the JSON Schema."""

from typing import Any

from jsonschema import Draft202012Validator

from lora_fx.spec.json_form.schema import json_schema

VALIDATOR = Draft202012Validator(json_schema())


def assert_valid(data: Any) -> None:
    """The schema finds nothing wrong."""
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []
