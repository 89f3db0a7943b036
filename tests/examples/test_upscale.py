from pathlib import Path

import pytest
import upscale
from transformers import AutoModelForCausalLM

import lora_fx

pytestmark = pytest.mark.real


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
def test_the_whole_job(smollm2: Path, tmp_path: Path) -> None:
    outcome = upscale.main(steps=4, held_out_blocks=4, out=tmp_path)
    assert outcome.before > outcome.base
    assert outcome.after < outcome.before - 0.1
    assert outcome.text.strip()
    plan = lora_fx.plan(upscale.SPEC, smollm2)
    adapter = 4 * plan.trainable
    assert adapter <= outcome.bytes - outcome.base_bytes < 1.01 * adapter
    base = AutoModelForCausalLM.from_pretrained(smollm2)
    assert len(lora_fx.load(tmp_path / "adapter", base).model.layers) == 40
