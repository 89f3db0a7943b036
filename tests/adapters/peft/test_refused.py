"""A folder that does not fit is refused whole; every fault is named, nothing is changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_fx
from tests.adapters.peft.both import PREFIX, compiled, logits, peft_model
from tests.adapters.peft.state import assert_same, snapshot
from tests.golden import assert_golden
from tests.tiny import llama

MODEL = "adapter other { rank = 2 init = random target o_proj }"
EXPECTED = Path(__file__).with_name("refused")
Q, V, DOWN = (
    f"{PREFIX}model.layers.{name}"
    for name in ("0.self_attn.q_proj", "1.self_attn.v_proj", "2.mlp.down_proj")
)


def config(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def tensors(change_state: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change_state(state)
        save_file(state, path)

    return change


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def several(state: dict[str, Tensor]) -> None:
    del state[f"{Q}.lora_A.weight"]
    state[f"{V}.lora_B.weight"] = torch.ones(16, 5)
    state[f"{DOWN}.lora_A.weight"][0, 0] = torch.nan
    state[f"{DOWN}.lora_magnitude_vector"] = torch.ones(3)


CASES = {
    "truncated-tensors": cut("adapter_model.safetensors", -1),
    "truncated-header": cut("adapter_model.safetensors", 5),
    "truncated-config": cut("adapter_config.json", 100),
    "no-tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "missing-tensor": tensors(lambda state: state.pop(f"{Q}.lora_B.weight")),
    "unexpected-tensor": tensors(lambda state: state.update(surprise=torch.ones(1))),
    "shape": tensors(lambda state: state.update({f"{Q}.lora_A.weight": torch.ones(3, 31)})),
    "nan": tensors(lambda state: state[f"{Q}.lora_A.weight"].fill_(torch.nan)),
    "infinity": tensors(lambda state: state[f"{Q}.lora_B.weight"][1, 1].fill_(torch.inf)),
    "integers": tensors(lambda state: state.update({k: t.int() for k, t in [*state.items()][:1]})),
    "several": tensors(several),
    "dora": config(use_dora=True),
    "modules-to-save": config(modules_to_save=["lm_head"]),
    "tokens": config(trainable_token_indices=[3, 4]),
    "bias": config(bias="all", lora_bias=True),
    "beyond-the-rows": config(trainable_token_indices=[3, 1000]),
    "pissa": config(init_lora_weights="pissa_niter_16"),
    "compressed": config(velora_config={"num_groups": 4}, init_lora_weights="pissa"),
    "other-method": config(peft_type="IA3"),
    "several-settings": config(use_dora=True, lora_bias=True, target_parameters=["w"]),
    "wrong-types": config(r="8", lora_alpha=None, rank_pattern={"(": 2}, lora_dropout=1.5),
    "replicated": config(layer_replication=[[0, 3], [1, 4]]),
    "embedding": config(target_modules=["embed_tokens"]),
    "no-target": config(target_modules=["nothing"]),
    "not-json-object": lambda folder: (folder / "adapter_config.json").write_text("[]"),
}


@pytest.fixture(scope="module")
def folder_of_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("peft")
    model = peft_model(target_modules=["q_proj", "v_proj", "down_proj"])
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, folder_of_peft: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in folder_of_peft.items():
        (tmp_path / name).write_bytes(content)
    model = compiled(MODEL)
    CASES[case](tmp_path)
    before, output = snapshot(model), logits(model)
    with pytest.raises(lora_fx.LoraFxError) as caught:
        model.load_adapter(tmp_path, "new")
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model), output)
    text = str(caught.value).replace(str(tmp_path), "FOLDER")
    lines = text.strip().splitlines()
    assert_golden(EXPECTED / f"{case}.expect", "\n".join(lines[:14] + ["…"] * (len(lines) > 14)))


def test_replication_that_is_missing(folder_of_peft: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in folder_of_peft.items():
        (tmp_path / name).write_bytes(content)
    model = compiled(f"layers {{ replicate 0..3, 1..4 }} {MODEL}")
    before = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError) as caught:
        model.load_adapter(tmp_path, "new")
    assert_same(snapshot(model), before)
    assert [d.code for d in caught.value.diagnostics] == ["adapter-replication"]


@pytest.mark.parametrize("as_path", [Path, str])
def test_no_such_folder(as_path: type, tmp_path: Path) -> None:
    model = compiled(MODEL)
    before = snapshot(model)
    with pytest.raises(lora_fx.LoraFxError, match="nowhere"):
        model.load_adapter(as_path(tmp_path / "nowhere"), "new")
    with pytest.raises(lora_fx.LoraFxError, match="nowhere"):
        lora_fx.load(as_path(tmp_path / "nowhere"), llama())
    assert_same(snapshot(model), before)


def test_a_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        peft_model().save_pretrained(tmp_path / name)
    with pytest.raises(lora_fx.LoraFxError, match="adapters below it: `one`, `two`"):
        compiled(MODEL).load_adapter(tmp_path, "new")


@pytest.mark.parametrize("case", ["truncated-config", "wrong-types", "dora"])
def test_load_refuses_as_load_adapter_does(
    case: str, folder_of_peft: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in folder_of_peft.items():
        (tmp_path / name).write_bytes(content)
    CASES[case](tmp_path)
    base = llama(4)
    before = snapshot(base)
    with pytest.raises(lora_fx.LoraFxError):
        lora_fx.load(tmp_path, base, backend=None)
    assert_same(snapshot(base), before)
