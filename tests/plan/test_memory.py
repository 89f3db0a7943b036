import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.sites.experts import Experts
from lora_fx.plan.memory import count_elements
from tests.plan.models import Shared, Tower
from tests.quantised import nf4
from tests.tiny import llama


def test_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False)).to(torch.bfloat16)
    model.register_buffer("kept", torch.zeros(11))
    text = """lora 1
adapter x { rank = 2 target "0" }
adapter y { rank = 3 dtype = bfloat16 target "1" }
adapter z { rank = 1 trainable = false target "1" }"""
    plan = lora_fx.plan(text, model)
    x, y, z = 2 * (5 + 7), 3 * (7 + 3), 1 * (7 + 3)
    assert plan.base == 5 * 7 + 7 + 7 * 3
    assert plan.trainable == x + y
    assert plan.all == plan.base + x + y + z
    base = 2 * plan.base + 4 * 11
    adapters, trained = 4 * x + 2 * y + 4 * z, 4 * x + 2 * y
    assert plan.memory() == {
        "base": base,
        "adapters": adapters,
        "gradients": trained,
        "optimizer": 2 * trained,
        "total": base + adapters + 3 * trained,
    }


def test_augmented_weights_are_held_twice() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Embedding(9, 4)).to(torch.bfloat16)
    text = 'lora 1 adapter x { rank = 2 target "0", "1", "2" } compile { layout = plain }'
    plain = lora_fx.plan(text, model).memory()["adapters"]
    augmented = lora_fx.plan(text.replace("plain", "augmented"), model).memory()["adapters"]
    assert augmented - plain == 2 * (7 * (5 + 64) + 3 * (7 + 64))
    held = lora_fx.compile(model, text.replace("plain", "augmented"))
    storages = [held[i].weight.untyped_storage().nbytes() for i in (0, 1)]
    assert augmented - plain == sum(storages)


@pytest.mark.parametrize("general", ["", ', general = ["c"]'])
def test_what_tokens_are_routed_by(general: str) -> None:
    adapters = (
        f"adapter {name} {{ rank = 2 dtype = bfloat16 trainable = false target q_proj, down_proj }}"
        for name in "abc"
    )
    text = "\n".join(["lora 1", *adapters])
    route = f"route {{ by = arrow(top = 1{general}) }}"
    base = llama(1)
    plain, routed = (lora_fx.plan(one, base).memory() for one in (text, f"{text} {route}"))
    model = lora_fx.compile(base, f"{text} {route}", backend=None)
    active = ["a", "b"] if general else ["a", "b", "c"]
    model.set_adapter(active)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    held = sum(one.nbytes for e in experts for one in e.buffers())
    assert routed["adapters"] - plain["adapters"] == held
    assert held >= len(active) * 4 * (32 + 44)


def test_shared_weights_count_once() -> None:
    plan = lora_fx.plan("lora 1 adapter x { rank = 1 target first }", Shared())
    assert plan.base == 5 * 7 + 7 + 7 * 3 + 3
    tied = llama(1, tie_word_embeddings=True)
    plan = lora_fx.plan("lora 1 adapter x { rank = 1 target q_proj }", tied)
    assert plan.base == sum(p.numel() for p in tied.parameters())


def test_packed_weights_count_as_what_they_stand_for() -> None:
    plain, packed = llama(2), nf4(llama(2))
    text = "lora 1 adapter x { rank = 1 target linear }"
    whole, small = lora_fx.plan(text, plain), lora_fx.plan(text, packed)
    assert small.all == whole.all
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 44)
    saved = whole.memory()["base"] - small.memory()["base"]
    assert 3 * linears < saved < 3.5 * linears
    weight = packed.model.layers[0].mlp.up_proj.weight
    assert count_elements(weight) == 32 * 44 == 2 * weight.numel()


def test_estimates_are_those_of_a_training_step() -> None:
    model = Tower(2)
    plan = lora_fx.plan("lora 1 adapter x { rank = 2 target linear }", model)
    factors = [nn.Parameter(torch.ones(n)) for n in (s.parameters for s in plan.sites)]
    optimizer = torch.optim.AdamW(factors)
    sum(f.sum() for f in factors).backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    assert sum(t.nbytes for t in state) == plan.memory()["optimizer"]
    assert sum(f.grad.nbytes for f in factors if f.grad is not None) == plan.memory()["gradients"]


def test_merged_weights_are_held_twice() -> None:
    text = """lora 1
    adapter x { rank = 2 target q_proj { lora_bias = true } target embed_tokens }
    adapter y { rank = 3 target q_proj, v_proj }"""
    base = llama(2, attention_bias=True).to(torch.bfloat16)
    plan = lora_fx.plan(text, base)
    assert plan.merged_bytes == 2 * (101 * 32 + 2 * (32 * 32 + 32 + 16 * 32))
    model = lora_fx.compile(base, text, backend=None)
    model.merge_adapter(["x", "y"])
    assert model.get_model_status().merged_bytes == plan.merged_bytes
    assert plan.to_json()["merged_bytes"] == plan.merged_bytes
