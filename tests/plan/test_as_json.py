import json
from dataclasses import fields
from pathlib import Path

import lora_fx
from lora_fx.plan.plan import Plan
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.sites import SitePlan
from tests.golden import assert_golden
from tests.plan.models import Tower
from tests.tiny import llama

TEXT = """lora 1
layers { replicate 0..2, 1..3 }
quantize head { method = nf4 }
adapter x {
  rank = 2
  bias = lora_only
  target up in layers[3] { init = mica }
  target head except norm { trainable = false  scaling = rslora }
  target? none
  train "blocks.0.norm"
}
adapter y { rank = 1 target parameter "blocks.1.down.weight" { alpha = 3 } }
route { slots = 4  when "both" -> x - 0.5 * y  default -> base }
merge one { from x + 0.25 * y  method = ties(density = 0.5)  rank = svd(1) }
optimizer { lr = 1e-3  betas = [0.9, 0.95] }
"""


def test_everything() -> None:
    text = json.dumps(lora_fx.plan(TEXT, Tower(3)).to_json(), indent=1, ensure_ascii=False)
    assert_golden(Path(__file__).parent / "plan.json", text)


def test_no_field_is_left_out() -> None:
    data = lora_fx.plan(TEXT, Tower(3)).to_json()
    elsewhere = {"spec": {"route", "merges", "optimizer"}, "blueprint": {"model"}}
    for field in fields(Plan):
        names = elsewhere.get(field.name, {field.name.removeprefix("_")})
        assert names <= data.keys(), field.name
    (site, *_) = data["sites"]
    instead = {"layer", "settings"}
    assert {field.name for field in fields(SitePlan)} - instead <= site.keys()
    assert {field.name for field in fields(QuantizedModule)} <= data["quantized"][0].keys()


def test_the_same_plan_is_the_same_text() -> None:
    text = "lora 1 adapter x { target linear } adapter y { init = mica target q_proj }"
    first, second = (json.dumps(lora_fx.plan(text, llama(2)).to_json()) for _ in range(2))
    assert first == second


def test_the_model_is_named() -> None:
    data = lora_fx.plan("lora 1 adapter x { target linear }", llama(2)).to_json()
    assert data["model"]["class"] == "LlamaForCausalLM"
    assert data["parameters"]["lm_head.weight"] == [101, 32]
    assert data["modules"]["lm_head"] == "Linear"
