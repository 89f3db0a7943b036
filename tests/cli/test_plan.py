import json
from pathlib import Path

import pytest

from lora_fx import cli
from lora_fx.plan import plan
from tests.cli.test_check import run
from tests.tiny import llama

SPEC = """lora 1
layers { replicate 0..3, 1..4 }

adapter default {
  rank  = 4
  alpha = 6
  target q_proj, down_proj
  target q_proj in layers[2, 4..] { rank = 3  scaling = rslora }
}

adapter frozen { rank = 2  trainable = false  target v_proj in layers[5] }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    config = llama(4).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "a.lora").write_text(SPEC)
    return tmp_path


def test_as_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "a.lora", "--model", "model/config.json", "--json") == 0
    data = json.loads(capfd.readouterr().out)
    assert data == json.loads(json.dumps(plan(Path("a.lora"), llama(4)).to_json()))


def test_notes_go_to_stderr(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("b.lora").write_text('lora 1 model "model" adapter x { target? none target q_proj }')
    assert run(monkeypatch, "plan", "b.lora") == 0
    out, err = capfd.readouterr()
    assert err.startswith("note[unmatched-target]")
    assert "model.layers.{0..3}.self_attn.q_proj" in out


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("lora 1 adapter x { target none }", "unmatched-target"),
        ("lora 1 adapter x { target }", "syntax-error"),
    ],
)
def test_what_is_wrong_goes_to_stderr(
    text: str,
    code: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("b.lora").write_text(text)
    assert run(monkeypatch, "plan", "b.lora", "--model", "model") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"error[{code}]")


def test_without_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "a.lora") == 1
    assert "error[no-model]" in capfd.readouterr().err


def test_activations_for_the_sizes_asked_for_or_of_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def memory(*arguments: str) -> dict[str, int]:
        assert run(monkeypatch, "plan", "b.lora", "--model", "model", "--json", *arguments) == 0
        return json.loads(capfd.readouterr().out)["memory"]

    Path("b.lora").write_text("lora 1\nadapter x { target linear }")
    assert "activations" not in memory()
    small, large = (
        memory("--batch", "2", "--sequence", "16"),
        memory("--batch", "6", "--sequence", "16"),
    )
    assert small["total"] == sum(size for name, size in small.items() if name != "total")
    assert 2 * small["activations"] < large["activations"] < 4 * small["activations"]
    entry = "compile { entry train { batch = 6  sequence = 16 } }"
    Path("b.lora").write_text(f"lora 1\nadapter x {{ target linear }}\n{entry}")
    assert memory() == large
    assert run(monkeypatch, "plan", "b.lora", "--model", "model") == 0
    assert "6 × 16 tokens, estimated" in capfd.readouterr().out


def test_activations_that_cannot_be_estimated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("speech.json").write_text('{"model_type": "wav2vec2", "num_hidden_layers": 1}')
    Path("b.lora").write_text("lora 1\nadapter x { target linear }")
    assert run(monkeypatch, "plan", "b.lora", "--model", "speech.json", "--batch", "2") == 0
    out, err = capfd.readouterr()
    assert err.startswith("note[no-estimate]")
    assert "`input_values`" in err
    assert "?  cannot be estimated" in out
    assert run(monkeypatch, "plan", "b.lora", "--model", "model", "--sequence", "2") == 2
    capfd.readouterr()
    assert run(monkeypatch, "plan", "b.lora", "--model", "model", "--batch", "2") == 0
    assert "help: give it too: `--sequence N`" in capfd.readouterr().err


def test_what_is_not_asked_for_is_that_of_the_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = "compile { entry train { batch = 6  sequence = 16 } }"
    Path("b.lora").write_text(f"lora 1\nadapter x {{ target linear }}\n{entry}")
    for option, said in (("--batch", "3 × 16 tokens"), ("--sequence", "6 × 3 tokens")):
        assert run(monkeypatch, "plan", "b.lora", "--model", "model", option, "3") == 0
        assert said in capfd.readouterr().out


def test_the_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("plan", "b.lora", "--model", "model")
    Path("b.lora").write_text("lora 1\nadapter x { rank = 2  target q_proj, v_proj }")
    assert run(monkeypatch, *arguments, "--detailed-exitcode") == 2  # there is none
    assert run(monkeypatch, *arguments, "--lock") == 0
    assert "wrote b.lora.lock" in capfd.readouterr().err
    assert run(monkeypatch, *arguments, "--detailed-exitcode", "--locked") == 0
    assert capfd.readouterr().err == ""
    llama(5).config.save_pretrained("model")
    assert run(monkeypatch, *arguments) == 0
    err = capfd.readouterr().err
    assert err.startswith("warning[lock-differs]")
    assert "model.layers.4.self_attn.q_proj" in err
    assert run(monkeypatch, *arguments, "--detailed-exitcode") == 2
    assert run(monkeypatch, *arguments, "--locked") == 1
    assert "error[lock-differs]" in capfd.readouterr().err
    assert run(monkeypatch, *arguments, "--lock") == 0
    assert "lock-differs" not in capfd.readouterr().err
    assert run(monkeypatch, *arguments, "--locked", "--detailed-exitcode") == 0


def test_a_help_for_each_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in cli.COMMANDS:
        assert run(monkeypatch, command, "--help") == 0
        assert "Usage: lora-fx" in capfd.readouterr().out
