import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lora_fx import cli
from lora_fx.spec import parse
from tests.tiny import SIZES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-fx", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    return raised.value.code if isinstance(raised.value.code, int) else 0


def test_a_file_for_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", "--model", "model") == 0
    assert capsys.readouterr().out.startswith(
        "wrote spec.lora\nnext: lora-fx plan spec.lora   # which module gets what"
    )
    for command in (["check"], ["fmt", "--check"], ["plan"]):
        assert run(monkeypatch, *command, "spec.lora") == 0


def test_the_model_is_named_from_where_the_file_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "specs").mkdir()
    assert run(monkeypatch, "init", "--model", "model", "--out", "specs/a.lora") == 0
    model = parse(folder / "specs" / "a.lora").model
    assert model is not None
    assert model.path == "../model"
    assert run(monkeypatch, "init", "--model", str(folder / "model"), "--out", "b.lora") == 0
    assert run(monkeypatch, "plan", "specs/a.lora") == run(monkeypatch, "plan", "b.lora") == 0


def test_a_file_for_any_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init") == 0
    assert "next: lora-fx plan spec.lora --model PATH" in capsys.readouterr().out
    assert run(monkeypatch, "check", "spec.lora") == 0
    assert run(monkeypatch, "plan", "spec.lora", "--model", "model") == 1
    assert "error[check-failed]" in capsys.readouterr().err  # a tiny model, and 5 % of it


def test_nothing_is_overwritten_by_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "spec.lora").write_text("mine")
    assert run(monkeypatch, "init") == 2
    assert "spec.lora is there already; --force overwrites it" in capsys.readouterr().err
    assert (folder / "spec.lora").read_text() == "mine"
    assert run(monkeypatch, "init", "--force") == 0
    assert (folder / "spec.lora").read_text().startswith("lora 1\n")


def test_no_file_without_a_model_that_can_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", "--model", str(folder)) == 1
    assert "error[no-model]" in capsys.readouterr().err
    assert not (folder / "spec.lora").exists()


def test_a_file_that_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", "--out", "nowhere/spec.lora") == 1
    assert (
        "error[unwritable-file]: `nowhere/spec.lora` cannot be written" in capsys.readouterr().err
    )
