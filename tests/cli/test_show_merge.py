"""`lora-fx show --stage merge`: the program that merges the first adapter into a layer."""

from pathlib import Path

import pytest

from tests.cli.test_check import run
from tests.golden import assert_golden
from tests.tiny import llama

SPEC = """lora 1
adapter default {
  rank = 2
  target q_proj, embed_tokens
}
adapter two { target q_proj }
"""


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    config = llama(3).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")

    def show(*options: str, spec: str = SPEC) -> str:
        Path("a.lora").write_text(spec)
        code = run(monkeypatch, "show", "a.lora", "--model", "model", "--stage", "merge", *options)
        captured = capfd.readouterr()
        return captured.err if code else captured.out

    return show


def test_of_a_layer(show) -> None:
    text = show("--layer", "2")
    assert_golden(Path(__file__).parent / "show-merge.expect", text)


def test_of_the_whole_model(show) -> None:
    text = show(spec=f"{SPEC}compile {{ unit = model }}")
    assert text.count("lora_fx.delta") == 4
    assert "lora_fx.delta(@model.embed_tokens.weight, " in text
    assert ".two." not in text


def test_what_cannot_be_merged(show) -> None:
    assert "[no-such-layer]" in show("--layer", "3")
    assert "[cannot-merge]" in show(spec=f"{SPEC}layers {{ replicate 0..3, 1..2 }}")
