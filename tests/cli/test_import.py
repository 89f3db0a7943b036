import json
from pathlib import Path

import pytest

from tests.architectures import on_meta
from tests.cli.test_check import process, run

CONFIG = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16, "peft_type": "LORA"}
TEXT = """\
lora 1

adapter default {
  rank  = 4
  alpha = 16

  target? q_proj, v_proj
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_to_stdout(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for given in ("adapter_config.json", "."):
        assert run(monkeypatch, "import", given) == 0
        assert capfd.readouterr() == (TEXT, "")


def test_for_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = on_meta("llama").config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    assert run(monkeypatch, "import", ".", "--model", "model") == 0
    assert capfd.readouterr().out == TEXT.replace("target?", "target")
    Path("adapter_config.json").write_text(json.dumps({**CONFIG, "target_modules": None}))
    assert run(monkeypatch, "import", ".", "--model", "model") == 0
    assert capfd.readouterr().out == TEXT.replace("target?", "target")


def test_a_file_is_not_overwritten_unasked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "import", ".", "--out", "a.lora") == 0
    assert capfd.readouterr().out == "wrote a.lora\n"
    assert Path("a.lora").read_text() == TEXT
    Path("a.lora").write_text("mine")
    assert run(monkeypatch, "import", ".", "--out", "a.lora") != 0
    assert "--force" in capfd.readouterr().err
    assert Path("a.lora").read_text() == "mine"
    assert run(monkeypatch, "import", ".", "--out", "a.lora", "--force") == 0
    assert Path("a.lora").read_text() == TEXT
    assert run(monkeypatch, "check", "a.lora") == 0


def test_what_cannot_be_said_is_shown_in_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("adapter_config.json").write_text(json.dumps({**CONFIG, "use_qalora": True}, indent=2))
    assert run(monkeypatch, "import", ".", "--out", "a.lora") == 1
    assert not Path("a.lora").exists()
    assert (
        """\
error[peft-unsupported]: `use_qalora = True` has no counterpart in the language
 --> adapter_config.json:9:3
  |
9 |   "use_qalora": true
  |   ^^^^^^^^^^^^^^^^^^
"""
        in capfd.readouterr().err
    )


def test_torch_is_loaded_only_for_a_model(folder: Path) -> None:
    done = process("import", ".", PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout == TEXT
    assert " torch\n" not in done.stderr
    control = process("import", ".", "--model", "none", PYTHONPROFILEIMPORTTIME="1")
    assert " torch\n" in control.stderr


def test_targets_that_depend_on_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("adapter_config.json").write_text(json.dumps({**CONFIG, "target_modules": None}))
    assert run(monkeypatch, "import", ".") == 1
    assert "error[peft-needs-model]" in capfd.readouterr().err
