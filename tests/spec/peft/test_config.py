"""What can be given as a config, and what is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, LoraRuntimeConfig

from lora_fx.diagnostics import LoraFxError, render
from lora_fx.spec.peft.read import read_config
from lora_fx.spec.peft.text import to_text
from tests.golden import assert_golden

HERE = Path(__file__).parent

SETTINGS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["0.self_attn.q_proj"],
    "r": 4,
    "rank_pattern": {"v_proj": 2},
    "task_type": "SEQ_CLS",
    "layer_replication": [(0, 2), (1, 3)],
    "velora_config": {"num_groups": 8},
}


def said(config: Any) -> str:
    with pytest.raises(LoraFxError) as raised:
        to_text(read_config(config))
    return render(raised.value.diagnostics)


def test_each_way_of_giving_a_config(tmp_path: Path) -> None:
    theirs = LoraConfig(**SETTINGS)
    theirs.save_pretrained(tmp_path)
    wanted = to_text(read_config(SETTINGS))
    assert wanted.count("target?") == 2
    for given in (theirs, theirs.to_dict(), tmp_path, tmp_path / "adapter_config.json"):
        assert sorted(to_text(read_config(given))) == sorted(wanted)  # PEFT keeps names in a set
    assert to_text(read_config(str(tmp_path))) == to_text(read_config(tmp_path))


def test_what_peft_does_not_save() -> None:
    runtime = LoraRuntimeConfig(ephemeral_gpu_offload=True)
    config = LoraConfig(target_modules=["q"], runtime_config=runtime)
    assert "offload = true" in " ".join(to_text(read_config(config)).split())


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.json").write_text('{"r": ')
    Path("list.json").write_text("[]")
    for path in ("half.json", "list.json", "none.json", "."):
        assert "error[adapter-unreadable]" in said(path)
    assert "a `int` is no PEFT config" in said(3)


def test_every_wrong_value_is_shown_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {
        "rank_pattern": {"r": 1, "(": 2},
        "r": 0,
        "modules_to_save": "head",
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [-1]},
    }
    Path("adapter_config.json").write_text(json.dumps(wrong, indent=2))
    assert_golden(HERE / "faults" / "wrong-values.expect", said("adapter_config.json"))


def test_every_setting_that_the_language_cannot_say() -> None:
    settings = {
        "target_modules": ["q_proj"],
        "use_qalora": True,
        "megatron_config": {"hidden_size": 8},
        "arrow_config": {"top_k": 3},
        "of_a_newer_peft": 3,
        "off_in_a_newer_peft": False,
        "use_dora": True,
        "kasa_config": {"delta": 1},
        "init_lora_weights": "of a newer PEFT",
    }
    assert_golden(HERE / "faults" / "unsupported.expect", said(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3", "feedforward_modules": ["x"]}, "`peft_type = 'IA3'` is not LoRA"),
        ({"init_lora_weights": "new"}, "`init_lora_weights = 'new'` has no counterpart"),
        ({"init_lora_weights": "random"}, "'random'"),
        ({"init_lora_weights": "pissa_niter_x"}, "'pissa_niter_x'"),
        ({"kasa_config": {"delta": 1}}, "`delta = 1` of `kasa_config` is not known"),
        ({"target_modules": "q", "layers_to_transform": 1}, "needs a list of names"),
        ({"layers_pattern": "h"}, "says nothing without `layers_to_transform`"),
        ({"use_bdlora": True}, "must be an object with the method's settings"),
        ({"target_modules": None}, "which PEFT takes depends on the model"),
        ({"target_modules": None, "target_parameters": ["w"]}, "depends on the model"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    text = said({"target_modules": ["q_proj"], **settings})
    assert message in text
    assert text.count("error[") == 1
