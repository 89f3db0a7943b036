"""What `save_pretrained` writes, PEFT reads and computes the same function from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.adapters.peft.both import (
    PROJECTIONS,
    assert_same_logits,
    compiled,
    from_folder,
    peft_model,
)

PLAIN = "adapter default { rank = 3 alpha = 5 init = random target linear }"
RANKS_BY_LAYER = """adapter default { rank = 3 alpha = 5 init = random target linear
  target v_proj in layers [1..3] { rank = 7 } target up_proj { rank = 2 alpha = 11 } }"""


def written(model: nn.Module, folder: Path) -> tuple[dict, dict]:
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "adapter",
    [
        PLAIN,
        RANKS_BY_LAYER,
        "adapter default { rank = 3 scaling = 0.37 init = random target linear }",
        """adapter default { rank = 3 alpha = 5 init = random target linear
             target q_proj, o_proj in layers [2..] { rank = 7 scaling = rslora } }""",
        """adapter default { rank = 3 alpha = 5 scaling = rslora init = random target linear
             target k_proj { scaling = alpha / rank } }""",
        """adapter default { rank = 3 alpha = 5 init = random
             target q_proj in layers [1..2] target "model.layers.*.mlp.*_proj" in layers [3..] }""",
        "adapter default { rank = 3 alpha = 5 init = random target linear, lm_head }",
    ],
    ids=["uniform", "ranks", "number", "mixed-rslora", "mostly-rslora", "some-layers", "head"],
)
def test_peft_computes_the_same(adapter: str, tmp_path: Path) -> None:
    model = compiled(adapter)
    _, state = written(model, tmp_path)
    assert_same_logits(from_folder(tmp_path), model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_layer_replication(tmp_path: Path) -> None:
    model = compiled(f"layers {{ replicate 0..3, 1..4 }} {RANKS_BY_LAYER}")
    config, state = written(model, tmp_path)
    assert config["layer_replication"] == [[0, 3], [1, 4]]
    assert "base_model.model.model.layers.5.mlp.up_proj.lora_A.weight" in state
    assert_same_logits(from_folder(tmp_path), model)


def test_keys_shapes_and_dtypes_are_those_of_peft(tmp_path: Path) -> None:
    theirs = peft_model()
    theirs.save_pretrained(tmp_path / "theirs")
    _, ours = written(compiled(PLAIN), tmp_path / "ours")
    want = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
        k: (t.shape, t.dtype) for k, t in want.items()
    }


def test_uniform_config_is_short(tmp_path: Path) -> None:
    config, _ = written(compiled(PLAIN), tmp_path)
    assert config["target_modules"] == sorted(PROJECTIONS)
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["task_type"] == "CAUSAL_LM"


def test_each_adapter_has_its_folder(tmp_path: Path) -> None:
    model = compiled(f"{PLAIN} adapter two {{ rank = 2 init = random target down_proj }}")
    model.save_pretrained(tmp_path)
    assert_same_logits(from_folder(tmp_path), model)
    model.set_adapter("two")
    assert_same_logits(from_folder(tmp_path / "two"), model)


def test_an_adapter_in_bfloat16_stays_so(tmp_path: Path) -> None:
    model = compiled(PLAIN.replace("rank", "dtype = bfloat16 rank"))
    _, state = written(model, tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert_same_logits(from_folder(tmp_path), model)


def test_no_file_is_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled(PLAIN)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("lora_fx.adapters.peft.write.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
