"""Stacked experts: PEFT with equal tensors, and dense float64, compute the same."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from tests.adapters.kinds import Kind, by_peft, dense, of, ours, state_of, step, step_of_peft
from tests.adapters.test_kinds import EXPERTS, STACKS, assert_same
from tests.adapters.test_kinds import KINDS as SHARED
from tests.dense import relative
from tests.example_inputs import example_inputs

BOTH = EXPERTS
PEFT = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


KINDS = {
    "mixtral": SHARED["experts"],
    "gpt_oss": SHARED["turned experts"],
    "a matrix": SHARED["a parameter"],
    "qwen3_moe": Kind(of("qwen3_moe"), BOTH, PEFT, parameters=STACKS),
    "olmoe": Kind(of("olmoe"), BOTH, PEFT, parameters=STACKS),
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
