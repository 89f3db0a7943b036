"""LoRA+: B learns faster than A; PEFT's `create_loraplus_optimizer` takes the same steps."""

from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.optimizer.stepped import ours, stepped, theirs
from tests.tiny import assert_equal, llama

ADAPTER = """lora 1
adapter default { rank = 3 alpha = 5 init = random target q_proj, up_proj, embed_tokens }
"""
SPEC = (
    ADAPTER
    + """optimizer {
  lr = 2e-3  loraplus_ratio = 16  weight_decay = 0.1  embedding_lr = 5e-4
  betas = [0.8, 0.95]  eps = 1e-7
}"""
)


def by_peft(model: nn.Module) -> Optimizer:
    return create_loraplus_optimizer(
        model,
        AdamW,
        lr=2e-3,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=5e-4,
        betas=(0.8, 0.95),
        eps=1e-7,
    )


def test_steps_are_those_of_peft() -> None:
    want = stepped(theirs(SPEC), by_peft)
    assert_equal(stepped(ours(SPEC), lora_fx.optimizer), want)
    equal_rates = stepped(ours(SPEC.replace("loraplus_ratio = 16", "")), lora_fx.optimizer)
    B = next(name for name in want if "lora_B" in name)
    assert relative(equal_rates[B], want[B]) > 0.5


def test_sgd_with_momentum() -> None:
    text = ADAPTER + "optimizer { name = sgd lr = 1e-2 momentum = 0.7 loraplus_ratio = 4 }"
    peft = {"lr": 1e-2, "loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-2, "momentum": 0.7}
    want = stepped(theirs(text), lambda model: create_loraplus_optimizer(model, SGD, **peft))
    assert_equal(stepped(ours(text), lora_fx.optimizer), want)


EVERYTHING = """lora 1
adapter default {
  rank = 3  lora_bias = true
  target up_proj
  target q_proj { variant = dora  lora_bias = false }
  target embed_tokens { lora_bias = false }
  train "model.layers.0.mlp.down_proj", "model.norm"
}
optimizer { lr = 1e-3  loraplus_ratio = 8  weight_decay = 0.1 }
"""


def test_each_parameter_is_in_one_group() -> None:
    model = ours(EVERYTHING)
    optimizer = lora_fx.optimizer(model)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            found[name.removeprefix("model.")] = group["lr"], group["weight_decay"]
    assert not [n for n, p in model.named_parameters() if p.requires_grad and n in names.values()]
    layer = "layers.1"
    assert found[f"{layer}.mlp.up_proj.lora_A.default.weight"] == (1e-3, 0.1)
    assert found[f"{layer}.mlp.up_proj.lora_B.default.weight"] == (8e-3, 0.1)
    assert found[f"{layer}.mlp.up_proj.lora_B.default.bias"] == (8e-3, 0.0)
    magnitude = next(name for name in found if "magnitude" in name)
    assert found[magnitude] == (1e-3, 0.0)
    of_embedding = [rates for name, rates in found.items() if "embed_tokens" in name]
    assert of_embedding == [(1e-3, 0.1)] * 2
    assert found["layers.0.mlp.down_proj.weight"] == (1e-3, 0.1)
    assert found["norm.weight"] == (1e-3, 0.0)


def test_magnitudes_of_convolutions_are_vectors() -> None:
    text = """lora 1
    adapter default { rank = 2  variant = dora  target class "Conv2d" }
    optimizer { lr = 1e-3  weight_decay = 0.1 }"""
    model: Any = lora_fx.compile(nn.Sequential(nn.Conv2d(3, 5, 2)), text, backend=None)
    magnitude = model[0].lora_magnitude_vector["default"].weight
    assert magnitude.shape == (1, 5, 1, 1)
    decays = {
        parameter: group["weight_decay"]
        for group in lora_fx.optimizer(model).param_groups
        for parameter in group["params"]
    }
    assert decays.pop(magnitude) == 0
    assert list(decays.values()) == [0.1, 0.1]


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_eight_bits_but_for_embeddings(name: str) -> None:
    text = (
        """lora 1
    adapter default { rank = 64 init = random target up_proj, embed_tokens train lm_head }
    """
        + f"optimizer {{ name = {name} lr = 1e-3 }}"
    )
    model = lora_fx.compile(llama(2, hidden_size=128, intermediate_size=172), text, backend=None)
    made: list[Optimizer] = []

    def make(model: nn.Module) -> Optimizer:
        made.append(lora_fx.optimizer(model))
        return made[0]

    eight = stepped(model, make)
    dtypes = {
        n: made[0].state[p]["state1"].dtype for n, p in model.named_parameters() if n in eight
    }
    of_embedding = {dtype for n, dtype in dtypes.items() if "embedding" in n}
    assert of_embedding == {torch.float32}
    assert {dtype for n, dtype in dtypes.items() if "embedding" not in n} == {torch.uint8}
    exact = lora_fx.compile(
        llama(2, hidden_size=128, intermediate_size=172), text.replace(name, "adamw"), backend=None
    )
    for parameter, change in stepped(exact, lora_fx.optimizer).items():
        assert relative(eight[parameter], change) < 0.2, parameter


def test_a_model_without_optimizer_is_told_how() -> None:
    with pytest.raises(LoraFxError, match="no `optimizer`"):
        lora_fx.optimizer(ours(ADAPTER))
    with pytest.raises(LoraFxError, match="no `optimizer`"):
        lora_fx.optimizer(llama(1))


def test_nothing_to_train_is_refused() -> None:
    text = SPEC.replace("rank = 3", "rank = 3 trainable = false")
    with pytest.raises(LoraFxError, match="nothing of this model is trained"):
        lora_fx.optimizer(ours(text))
