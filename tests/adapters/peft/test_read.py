"""Adapters that PEFT wrote compute the same here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_fx
from tests.adapters.peft.both import (
    PROJECTIONS,
    assert_same_logits,
    compiled,
    from_folder,
    logits,
    peft_model,
)
from tests.dense import relative
from tests.tiny import llama

OTHER = "adapter other { rank = 2 init = random target o_proj }"
FULL_NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"v_proj": 7, r"layers\.[12]\.mlp\.up_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2, "o_proj": 3}},
    "first_pattern_wins": {"rank_pattern": {r".*\.mlp\..*": 2, "up_proj": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 7}},
    "layers": {"layers_to_transform": [0, 3]},
    "one_layer": {"layers_to_transform": 2},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*\.(?:0|2)\..*\.(q|v)_proj"},
    "full_names": {"target_modules": FULL_NAMES},
    "full_name_beats_layers": {
        "target_modules": [*FULL_NAMES, "down_proj"],
        "layers_to_transform": [1],
    },
    "exclude": {"exclude_modules": ["mlp.up_proj", "model.layers.1.self_attn.q_proj"]},
    "exclude_regex": {"exclude_modules": r".*\.layers\.[02]\..*"},
    "all_linear": {"target_modules": "all-linear"},
}


def saved(folder: Path, **settings: Any) -> Path:
    peft_model(**settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_peft_folders_load(case: str, tmp_path: Path) -> None:
    theirs = from_folder(saved(tmp_path, **CASES[case]))
    loaded = lora_fx.load(tmp_path, llama(4), backend=None)
    assert loaded.active_adapters() == ["default"]
    assert_same_logits(loaded, theirs)
    model = compiled(OTHER)
    before = logits(model)
    model.load_adapter(tmp_path, "theirs")
    assert torch.equal(logits(model), before)
    model.set_adapter("theirs")
    assert_same_logits(model, theirs)


def test_layer_replication(tmp_path: Path) -> None:
    theirs = from_folder(saved(tmp_path, layer_replication=[[0, 3], [1, 4]]))
    assert_same_logits(lora_fx.load(tmp_path, llama(4), backend=None), theirs)
    model = compiled(f"layers {{ replicate 0..3, 1..4 }} {OTHER}")
    model.load_adapter(tmp_path, "theirs")
    model.set_adapter("theirs")
    assert_same_logits(model, theirs)


def test_the_short_suffixes_of_many_targets(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.self_attn.{p}" for i in range(8) for p in ("q_proj", "k_proj")]
    names += [f"model.layers.{i}.mlp.up_proj" for i in range(1, 8)]
    base = llama(8)
    peft_model(base, target_modules=names).save_pretrained(tmp_path)
    short = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert 2 < len(short) < 20
    theirs = from_folder(tmp_path, llama(8))
    assert_same_logits(lora_fx.load(tmp_path, llama(8), backend=None), theirs)


def test_all_linear_as_a_word(tmp_path: Path) -> None:
    saved(tmp_path, target_modules="all-linear")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert sorted(config["target_modules"]) == sorted(PROJECTIONS)
    path.write_text(json.dumps(config | {"target_modules": "all-linear"}))
    assert_same_logits(lora_fx.load(tmp_path, llama(4), backend=None), from_folder(tmp_path))


def test_every_adapter_of_a_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    peft_model(r=2, target_modules=["o_proj"]).save_pretrained(tmp_path / "two")
    model = lora_fx.load(tmp_path, llama(4), backend=None)
    for name, folder in (("default", tmp_path), ("two", tmp_path / "two")):
        model.set_adapter(name)
        assert_same_logits(model, from_folder(folder))


def test_a_pickled_adapter(tmp_path: Path) -> None:
    theirs = from_folder(saved(tmp_path))
    tensors = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(tensors), tmp_path / "adapter_model.bin")
    tensors.unlink()
    assert_same_logits(lora_fx.load(tmp_path, llama(4), backend=None), theirs)


def test_there_and_back(tmp_path: Path) -> None:
    """Written here, read there, written there, read here: bit for bit."""
    model = compiled(f"{OTHER.replace('other', 'default')} layers {{ replicate 0..3, 1..4 }}")
    model.save_pretrained(tmp_path / "ours")
    from_folder(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = lora_fx.load(tmp_path / "theirs", llama(4), backend=None)
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter():
        assert relative(logits(model), logits(again)) > 1e-3


@pytest.mark.parametrize("into", ["new", "there"])
def test_a_file_that_changes_later_changes_nothing(into: str, tmp_path: Path) -> None:
    saved(tmp_path)
    model = compiled(OTHER)
    model.load_adapter(tmp_path, "theirs")
    if into == "there":
        model.load_adapter(tmp_path, "theirs")
    model.set_adapter("theirs")
    before = logits(model)
    with open(tmp_path / "adapter_model.safetensors", "r+b") as file:
        start = int.from_bytes(file.read(8), "little") + 8
        file.seek(start)
        values = torch.frombuffer(bytearray(file.read()), dtype=torch.float32)
        file.seek(start)
        file.write((2 * values).numpy().tobytes())
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path, "theirs")
    assert relative(logits(model), before) > 1e-3


def test_a_file_of_eight_bit_floats(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    narrow = {name: t.to(torch.float8_e5m2) for name, t in load_file(path).items()}
    save_file(narrow, path)
    small = lora_fx.load(tmp_path, llama(4), backend=None)
    save_file({name: t.float() for name, t in narrow.items()}, path)
    assert torch.equal(logits(small), logits(lora_fx.load(tmp_path, llama(4), backend=None)))
    next(iter(narrow.values())).view(torch.uint8)[1, 2] = 0x7C  # infinity
    save_file(narrow, path)
    with pytest.raises(lora_fx.LoraFxError, match="NaN or infinity"):
        small.load_adapter(tmp_path, "again")
