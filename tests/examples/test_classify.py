from pathlib import Path

import classify
import pytest
import torch
from peft import PeftModel
from python_topics import TOPICS, split
from transformers import AutoTokenizer

import lora_fx


def test_no_paragraph_is_in_both_parts() -> None:
    training, held_out = ({p.text for p in part} for part in split())
    assert len(training) > 3 * len(held_out) > 100
    assert not training & held_out
    for part in split():
        assert {paragraph.topic for paragraph in part} == set(range(len(TOPICS)))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")  # by PEFT and TRL
def test_the_whole_job(minilm: Path, tmp_path: Path) -> None:
    outcome = classify.main(steps=12, out=tmp_path)
    assert outcome.before < 0.4
    assert outcome.after > outcome.before + 0.2
    assert outcome.reloaded == outcome.after
    bases = [classify.read(minilm, seed) for seed in (3, 4)]
    peft = PeftModel.from_pretrained(bases[0], tmp_path).eval()
    ours = lora_fx.load(tmp_path, base=bases[1], backend=None).eval()
    _, held_out = split()
    inputs = classify.batch(AutoTokenizer.from_pretrained(minilm), held_out[:8])
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, peft(**inputs).logits)
