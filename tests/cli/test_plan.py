import json
from pathlib import Path

import pytest

from lora_fx import cli
from lora_fx.cli.plan_table import fold
from lora_fx.plan import plan
from tests.cli.test_check import run
from tests.golden import assert_golden
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


def test_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "plan", "a.lora", "--model", "model") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert_golden(Path(__file__).parent / "plan.expect", out)


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


def test_rows_hold_every_site_once() -> None:
    planned = plan(SPEC, llama(4))
    rows = fold(planned)
    assert [name for name, _ in rows] == [
        "model.layers.{0..1,3}.self_attn.q_proj",
        "model.layers.{0..5}.mlp.down_proj",
        "model.layers.{2,4..5}.self_attn.q_proj",
        "model.layers.5.self_attn.v_proj",
    ]
    sites = [site for _, row in rows for site in row]
    assert len(sites) == len(planned.sites)
    assert {(s.fqn, s.adapter) for s in sites} == {(s.fqn, s.adapter) for s in planned.sites}


def test_what_differs_is_not_folded() -> None:
    spec = "lora 1 adapter x { rank = layer.index + 1 target q_proj }"
    assert len(fold(plan(spec, llama(4)))) == 4
    hidden = "seed = layer.index compute = if layer.index < 2 then float32 else activation"
    assert len(fold(plan(f"lora 1 adapter x {{ {hidden} target q_proj }}", llama(4)))) == 2


def test_a_help_for_each_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in cli.COMMANDS:
        assert run(monkeypatch, command, "--help") == 0
        assert "Usage: lora-fx" in capfd.readouterr().out
