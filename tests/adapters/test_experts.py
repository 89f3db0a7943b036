"""Stacked experts: PEFT with equal tensors, and dense float64, compute the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.adapters.kinds import Kind, by_peft, dense, of, ours, state_of, step, step_of_peft
from tests.adapters.test_kinds import assert_same
from tests.dense import relative
from tests.example_inputs import example_inputs

BOTH = "target parameter \"**.experts.{gate_up_proj,down_proj}\""
STACKS = ("gate_up_proj", "down_proj")
PEFT = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def experts(name: str, implementation: str, **config: Any) -> Callable[[], PreTrainedModel]:
    return of(name, _experts_implementation=implementation, **config)


KINDS = {
    "mixtral": Kind(of("mixtral"), BOTH, PEFT, parameters=STACKS),
    "qwen3_moe": Kind(of("qwen3_moe"), BOTH, PEFT, parameters=STACKS),
    "olmoe": Kind(of("olmoe"), BOTH, PEFT, parameters=STACKS),
    "gpt_oss, turned": Kind(of("gpt_oss"), BOTH, PEFT, parameters=STACKS),
    "one of two": Kind(
        of("mixtral"),
        'target parameter "**.experts.down_proj"',
        {"target_parameters": ["experts.down_proj"]},
        parameters=("down_proj",),
    ),
    "rslora": Kind(
        of("mixtral"),
        f"scaling = rslora {BOTH}",
        {**PEFT, "use_rslora": True},
        scaling=5 / 3**0.5,
        parameters=STACKS,
    ),
    "a matrix": Kind(
        of("mixtral"),
        'target parameter "**.mlp.gate.weight"',
        {"target_parameters": ["mlp.gate.weight"]},
        parameters=("weight",),
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_as_peft_and_as_dense_weights(name: str, implementation: str) -> None:
    kind = with_implementation(KINDS[name], implementation)
    model = ours(kind)
    got, state = step(model), state_of(model)
    assert_same(got, step_of_peft(by_peft(kind, state)))
    assert_same(got, dense(kind, state))
    plain = kind.base()
    inputs = example_inputs(plain)
    with model.disable_adapter(), torch.no_grad():
        off, base = model(**inputs).logits, plain(**inputs).logits
    assert torch.equal(off, base)
    assert relative(got["logits"], base) > 1e-3


def with_implementation(kind: Kind, implementation: str) -> Kind:
    def build() -> PreTrainedModel:
        model = kind.base()
        model.set_experts_implementation(implementation)
        return model

    return replace(kind, base=build)
