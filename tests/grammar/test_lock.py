"""What the reference says of the lock."""

import json
import re

import lora_fx
from lora_fx.cli.plan import plan as plan_command
from lora_fx.plan.lock import from_json, lock_of
from tests.grammar.reference import model, section

LOCK = section("The lock")


def test_the_example_is_the_lock() -> None:
    (spec,) = re.findall(r"```lora\n(.*?)```", LOCK, re.DOTALL)
    (shown,) = re.findall(r"```json\n(.*?)```", LOCK, re.DOTALL)
    written = lock_of(lora_fx.plan(spec, model(""))).to_json()
    assert json.loads(shown) == written["adapters"]
    assert shown == json.dumps(written["adapters"], indent=2, sort_keys=True) + "\n"


def test_both_ends_of_a_range_belong_to_it() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", LOCK, re.DOTALL)
    data = {"lock": 1, "language": 1, "files": {}, "model": {}, "quantize": []}
    lock = from_json(data | {"adapters": json.loads(shown)})
    assert len(lock.ranks["default"]) == 32 + 32 + 4


def test_the_options_are_there() -> None:
    told = {word.replace("-", "_") for word in re.findall(r"--([a-z-]+)", LOCK)}
    assert told == {"lock", "locked", "detailed_exitcode"}
    assert told <= plan_command.__annotations__.keys()
