"""Which adapters act, learn and are merged, and where: beside PEFT's own answer."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import lora_fx
from tests.adapters.kinds import by_peft, ours, state_of
from tests.adapters.test_kinds import KINDS
from tests.tiny import llama, spec

TWO = spec() + "adapter two { rank = 3 trainable = false target q_proj train 'model.norm' }"
TWO = TWO.replace("'", '"')
ALIKE = ("conv1d", "lora_bias", "embedding", "train", "tokens", "dora", "scaled tied embedding")


def both() -> Any:
    return lora_fx.compile(llama(2), TWO, backend=None)


@pytest.mark.parametrize(
    ("name", "merged"),
    [*((name, False) for name in ALIKE), *((name, True) for name in ALIKE[:-1])],
)
def test_as_peft(name: str, merged: bool) -> None:
    model = ours(KINDS[name])
    theirs = by_peft(KINDS[name], state_of(model))
    if merged:
        model.merge_adapter()
        theirs.merge_adapter()
    status = theirs.get_layer_status()
    wanted = {one.name.removeprefix("model.").replace(".token_adapter", ""): one for one in status}
    found = {one.name: one for one in model.get_layer_status()}
    assert found.keys() == wanted.keys()
    fields = ("enabled", "active_adapters", "available_adapters", "requires_grad", "devices")
    for fqn, one in found.items():
        for field in fields:
            assert getattr(one, field) == getattr(wanted[fqn], field), (fqn, field)
        if one.ranks:
            assert one.merged_adapters == wanted[fqn].merged_adapters
    whole, of_peft = model.get_model_status(), theirs.get_model_status()
    assert whole.trainable_params == of_peft.trainable_params
    assert whole.num_adapter_layers == of_peft.num_adapter_layers
    assert whole.merged_adapters == ["default"] * merged
    for field in ("base_model_type", "available_adapters", "requires_grad", "devices"):
        assert getattr(whole, field) == getattr(of_peft, field), field


def test_of_layers() -> None:
    model = both()
    model.merge_adapter("two")
    found = {one.name: one for one in model.get_layer_status()}
    assert list(found)[-1] == "model.norm"
    assert len(found) == 2 * 7 + 1
    query, norm = found["model.layers.1.self_attn.q_proj"], found["model.norm"]
    assert query.module_type == "Linear"
    assert (query.active_adapters, query.merged_adapters) == (["default"], ["two"])
    assert (query.available_adapters, query.ranks) == (["default", "two"], {"default": 4, "two": 3})
    assert query.requires_grad == {"default": True, "two": False}
    assert query.bytes == 4 * (64 * (4 + 3) + 32 * 32)
    assert (norm.active_adapters, norm.merged_adapters, norm.ranks) == ([], [], {})
    assert (norm.available_adapters, norm.bytes) == (["two"], 4 * 32)
    with model.disable_adapter():
        assert not any(one.enabled for one in model.get_layer_status())


def test_of_the_model() -> None:
    model, base = both(), llama(2)
    before = model.get_model_status()
    assert before.base_bytes == sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    adapters = [t for n, t in model.named_parameters() if "lora_" in n and ".base." not in n]
    assert before.adapter_bytes == sum(t.nbytes for t in adapters)
    assert before.merged_bytes == 0
    model.merge_adapter(["two"])
    after = model.get_model_status()
    assert after.merged_bytes == 2 * 4 * 32 * 32
    same = {"merged_adapters": ["two"], "merged_bytes": after.merged_bytes}
    assert after == replace(before, **same, total_params=after.total_params)
    model.lm_head.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.lora_A.default.weight.requires_grad_(False)
    assert model.get_model_status().requires_grad["default"] == "irregular"
    model.to(torch.bfloat16)
    assert model.get_model_status().base_bytes < 0.6 * before.base_bytes
    model.unmerge_adapter()
    model.set_adapter(["two", "default"])
    model.delete_adapter("default")
    left = model.get_model_status()
    assert (left.available_adapters, left.active_adapters) == (["two"], ["two"])
    assert left.num_adapter_layers == 3


def test_magnitudes_are_the_adapter_s() -> None:
    text = "lora 1 adapter default { rank = 3 variant = dora target q_proj }"
    model = lora_fx.compile(llama(2), text, backend=None)
    assert model.get_model_status().adapter_bytes == 2 * 4 * (3 * (32 + 32) + 32)
    model.model.layers[0].self_attn.q_proj.lora_magnitude_vector.default.requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}


@pytest.mark.parametrize("settings", ["init = pissa", "variant = velora"])
def test_what_an_adapter_started_as_and_follows_takes_bytes(settings: str) -> None:
    text = f"lora 1 adapter default {{ rank = 3 {settings} target q_proj }}"
    model = lora_fx.compile(llama(2), text, backend=None)
    held = sum(t.nbytes for name, t in model.state_dict().items() if "lora_" in name)
    status = model.get_model_status()
    assert status.adapter_bytes == held > 2 * 4 * 3 * (32 + 32)
    assert sum(layer.bytes for layer in model.get_layer_status()) == held
    assert status.requires_grad == {"default": True}


def test_what_is_left_after_unloading_has_no_status() -> None:
    plain = both().merge_and_unload()
    assert not hasattr(plain, "get_model_status")
