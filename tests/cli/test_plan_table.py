from pathlib import Path

import pytest
from rich.text import Text

from lora_fx.cli.plan_rows import adapter_rows
from lora_fx.plan import plan
from lora_fx.plan.plan import Plan
from tests.cli.test_check import run
from tests.golden import assert_golden
from tests.tiny import llama

HERE = Path(__file__).parent
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
EVERYTHING = """lora 1
quantize "**.mlp.up_proj" { method = nf4 }
adapter default {
  rank = 4
  bias = lora_only
  target q_proj { variant = dora }
  target embed_tokens { lora_bias = false }
  target k_proj in layers[1..] { dropout = 0.5  dtype = bfloat16 }
  train "model.layers.*.input_layernorm"
  tokens [3, 4]
}
adapter style { rank = 2  target v_proj }
route {
  slots = 4  max_rank = 8  train = true
  when "both" -> default - 0.5 * style
  default -> base
}
merge one { from default + 0.25 * style  method = ties(density = 0.5)  rank = svd(8)  save = "x" }
optimizer { name = adamw8bit  lr = 1e-4 }
compile { entry train { batch = 2  sequence = 16 } }
"""


def printed(
    text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path
) -> str:
    monkeypatch.chdir(folder)
    config = llama(4, attention_bias=True).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained("model")
    Path("a.lora").write_text(text)
    assert run(monkeypatch, "plan", "a.lora", "--model", "model") == 0
    return capfd.readouterr().out


@pytest.mark.parametrize(("name", "text"), [("plan", SPEC), ("plan-everything", EVERYTHING)])
def test_piped(
    name: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert_golden(HERE / f"{name}.expect", printed(text, monkeypatch, capfd, tmp_path))


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    text = EVERYTHING.replace("dropout = 0.5  dtype = bfloat16", "rank = 2").replace(
        "lora_bias = false", "dropout = 0"
    )
    out = Text.from_ansi(printed(text, monkeypatch, capfd, tmp_path)).plain
    assert_golden(HERE / f"plan-{width}.expect", out)
    assert max(map(len, out.splitlines())) <= max(width, 90)  # the merge is one long line


def names(planned: Plan) -> list[str]:
    return [str(row.name) for adapter in planned.adapters for row in adapter_rows(adapter)]


def test_weights_that_are_held_again_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = "layout = augmented"
    augmented = printed(f"{SPEC} compile {{ {line} }}", monkeypatch, capfd, tmp_path)
    assert line in augmented
    assert line not in printed(SPEC, monkeypatch, capfd, tmp_path)


def test_rows_hold_every_part_once() -> None:
    planned = plan(SPEC, llama(4))
    assert names(planned) == [
        "model.layers.{0..1,3}.self_attn.q_proj",
        "model.layers.{2,4..5}.self_attn.q_proj",
        "model.layers.{0..5}.mlp.down_proj",
        "model.layers.5.self_attn.v_proj",
    ]
    everything = plan(EVERYTHING, llama(4, attention_bias=True))
    for adapter in everything.adapters:
        parts = [id(part) for row in adapter_rows(adapter) for part in row.parts]
        assert sorted(parts) == sorted(map(id, adapter.everything))


def test_what_differs_is_not_folded() -> None:
    def rows(attribute: str) -> int:
        return len(names(plan(f"lora 1 adapter x {{ {attribute} target q_proj }}", llama(4))))

    assert rows("rank = layer.index + 1") == rows("seed = layer.index") == 4
    assert rows("compute = if layer.index < 2 then float32 else activation") == 2
    assert rows("offload = layer.index == 3") == 2
