from pathlib import Path

import pytest

import lora_fx
from lora_fx.runtime.artifact import layout
from tests.cli.test_check import run
from tests.runtime.artifact.made import one_program_each, text
from tests.tiny import llama


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path / "own"))
    llama(2).save_pretrained("model")
    Path("a.lora").write_text(text(""))
    return tmp_path


def test_it_writes_an_artifact(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["compile", "a.lora", "--model", "model", "--out", "deep/out"]
    assert run(monkeypatch, *line) == 0
    out, err = capfd.readouterr()
    assert out == "wrote deep/out (nothing compiled: the spec has no `entry`)\n"
    assert err == ""
    assert lora_fx.load("deep/out", backend="eager").active_adapters() == ["default"]
    capfd.readouterr()
    assert run(monkeypatch, *line) == 1
    out, err = capfd.readouterr()
    assert err.startswith("error[artifact-exists]")
    assert out == ""
    assert run(monkeypatch, *line, "--force") == 0


@pytest.mark.slow
def test_it_compiles_entries(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one_program_each(monkeypatch)
    Path("a.lora").write_text(text("forward").replace("lora 1", 'lora 1 model "model"'))
    assert run(monkeypatch, "compile", "a.lora", "--out", "out") == 0
    assert capfd.readouterr().out == "wrote out (compiled ahead: `entry forward`)\n"
    assert len(list(Path("out", layout.FUNCTIONS).iterdir())) == 2  # of a layer and of the loss


def test_notes_go_to_stderr(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("a.lora").write_text('lora 1 model "model" adapter x { target? none target q_proj }')
    assert run(monkeypatch, "compile", "a.lora", "--out", "out") == 0
    assert capfd.readouterr().err.startswith("note[unmatched-target]")


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("lora 1 adapter x { target none }", "unmatched-target"),
        ("lora 1 adapter x { target }", "syntax-error"),
        (
            "lora 1 adapter x { target linear  target q_proj { variant = kasa } }",
            "not-supported-yet",
        ),
    ],
)
def test_what_is_wrong_goes_to_stderr(
    spec: str,
    code: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("a.lora").write_text(spec)
    assert run(monkeypatch, "compile", "a.lora", "--model", "model", "--out", "out") == 1
    assert capfd.readouterr().err.startswith(f"error[{code}]")
    assert not Path("out").exists()


@pytest.mark.parametrize("model", ["./nothing", "config.json", "empty"])
def test_a_model_without_weights(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    llama(2).config.save_pretrained(".")
    llama(2).config.save_pretrained("empty")
    assert run(monkeypatch, "compile", "a.lora", "--model", model, "--out", "out") == 1
    assert capfd.readouterr().err.startswith("error[no-model]")
    assert not Path("out").exists()
