"""What PEFT's config cannot say comes back from the spec beside it."""

from pathlib import Path

import torch

import lora_fx
from lora_fx.adapters.storage import sites
from tests.tiny import llama, tokens

TEXT = """lora 1
adapter default {
  rank = 3  init = random  compute = bfloat16
  target linear { dropout = 0.1 }
  target q_proj { dropout = 0.3  compute = float32 }
}
adapter style { rank = 2  init = random  target o_proj }
compile { unit = model }
check sites == 16"""


def arithmetic(model: torch.nn.Module) -> dict:
    return {fqn: dict(site.lora_arithmetic) for fqn, site in sites(model)}


def test_dropout_compute_and_unit_are_those_of_the_spec(tmp_path: Path) -> None:
    model = lora_fx.compile(llama(), TEXT, backend=None)
    model.save_pretrained(tmp_path)
    loaded = lora_fx.load(tmp_path, llama(), backend=None)
    assert arithmetic(loaded) == arithmetic(model)
    assert loaded.lora_fx_plan.spec.compile.unit == "model"
    for active in ("default", "style"):
        loaded.set_adapter(active), model.set_adapter(active)
        assert torch.equal(loaded.eval()(tokens()).logits, model.eval()(tokens()).logits)


def test_without_the_spec_it_is_what_the_config_says(tmp_path: Path) -> None:
    model = lora_fx.compile(llama(), TEXT, backend=None)
    model.save_pretrained(tmp_path)
    (tmp_path / "spec.lora").unlink()
    loaded = lora_fx.load(tmp_path, llama(), backend=None)
    assert arithmetic(loaded) != arithmetic(model)
    assert {a.compute for b in arithmetic(loaded).values() for a in b.values()} == {"activation"}


def test_included_files_are_saved_with_it(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    (tmp_path / "style.lora").write_text("lora 1 adapter style { dropout = 0.2  target o_proj }")
    (tmp_path / "root.lora").write_text(
        'lora 1 include "style.lora" adapter default { rank = 3 target q_proj }'
    )
    model = lora_fx.compile(llama(), tmp_path / "root.lora", backend=None)
    model.save_pretrained(saved)
    (tmp_path / "style.lora").unlink()
    loaded = lora_fx.load(saved, llama(), backend=None)
    assert arithmetic(loaded) == arithmetic(model)
    assert {a["style"].dropout for a in arithmetic(loaded).values() if "style" in a} == {0.2}
