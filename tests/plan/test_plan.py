import copy
import json
import pickle

import pytest
from torch import nn

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.plan import plan_sites
from lora_fx.spec import parse
from tests.plan.models import Pair, Tower

TEXT = """lora 1
layers { replicate 0..2, 1..3 }
adapter x { rank = 2 target up in layers[3] }
adapter y { rank = 1 target head  trainable = false }"""


def test_the_package_is_the_function_too() -> None:
    assert lora_fx.plan(parse(TEXT), Tower()).sites == lora_fx.plan(TEXT, Tower()).sites


def test_as_json() -> None:
    plan = lora_fx.plan(TEXT, Tower())
    data = json.loads(json.dumps(plan.to_json()))
    up, head = data["sites"]
    assert up["fqn"] == "blocks.3.up"
    assert up["rule"] == "<text>:3"
    assert up["provenance"] == {"rank": "<text>:3"}
    assert head["trainable"] is False
    assert data["layer_map"] == {
        "stack": "blocks",
        "ranges": [[0, 2], [1, 3]],
        "old": [0, 1, 1, 2],
    }
    assert data["trainable"] == plan.trainable == 2 * (5 + 7)
    assert data["memory"] == plan.memory()


def test_a_plan_can_be_copied_and_kept() -> None:
    plan = lora_fx.plan(TEXT, Tower())
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)).to_json() == plan.to_json()


def test_the_tree_is_only_read() -> None:
    tree = Tower()
    before = {name: (id(p), p.requires_grad) for name, p in tree.named_parameters()}
    plan_sites(parse("lora 1 adapter x { rank = 1 target linear }"), tree)
    assert {name: (id(p), p.requires_grad) for name, p in tree.named_parameters()} == before


def test_a_spec_without_adapters_plans_nothing() -> None:
    assert lora_fx.plan('lora 1 model "x"', Tower()).sites == ()


def checks(model: nn.Module, *conditions: str) -> list[str]:
    text = "lora 1 adapter x { rank = 1 target linear }\n" + "\n".join(
        f"check {condition}" for condition in conditions
    )
    try:
        lora_fx.plan(text, model)
    except LoraFxError as error:
        return [d.label or d.code for d in error.diagnostics]
    return []


def test_checks() -> None:
    assert (
        checks(Tower(), "layer.count == 3 and sites == 9", "trainable < 50%", "not memory < 1")
        == []
    )
    assert checks(Tower(), "layer.count == 4 or sites < 9") == ["`layer.count` is 3, `sites` is 9"]
    assert checks(Pair(), "layer.count == 4", "sites == 18") == ["the model has 2 stacks of layers"]
    assert checks(Tower(), "sites + 1") == ["is 10"]
    assert checks(Tower(), "model.config.x == 1") == ["no-config"]


def test_checks_see_the_replicated_model() -> None:
    lora_fx.plan(f"{TEXT} check layer.count == 4", Tower())
    with pytest.raises(LoraFxError):
        lora_fx.plan(f"{TEXT} check layer.count == 3", Tower())
