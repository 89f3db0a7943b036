import math
from pathlib import Path

import preference
import pytest
import python_topics
import torch
from memory import bytes_of
from safetensors import safe_open

import lora_fx
from tests.tiny import llama


def test_pairs_are_of_two_topics() -> None:
    training, _ = python_topics.split()
    topics = {word: p.topic for p in training for word in [p.text[-80:]]}
    for paragraph, pair in zip(training, preference.pairs(training), strict=True):
        assert paragraph.text.startswith(pair["prompt"] + pair["chosen"])
        others = [topic for end, topic in topics.items() if end.endswith(pair["rejected"][-40:])]
        assert others
        assert paragraph.topic not in others


def test_the_loss_is_that_of_two_models() -> None:
    base = llama()
    text = "lora 1 adapter policy { rank = 3 alpha = 60 init = random target linear }"
    model = lora_fx.compile(base, text, backend=None)
    tokens = torch.arange(1, 41).view(4, 10)
    mask = (torch.arange(10) >= 4).long().expand(4, 10)
    batch = {"input_ids": tokens, "attention_mask": mask**0, "completion_mask": mask}
    terms = []
    for chosen, rejected in ((0, 2), (1, 3)):
        margin = 0.0
        for sign, row in ((1, chosen), (-1, rejected)):
            for which, one in ((1, model), (-1, base)):
                logits = one(tokens[row : row + 1]).logits[0].double().log_softmax(-1)
                likely = sum(logits[i - 1, tokens[row, i]].item() for i in range(4, 10))
                margin += sign * which * likely
        terms.append(math.log1p(math.exp(-preference.BETA * margin)))
    got = preference.preference_loss(model, batch).item()
    assert got == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert abs(got - math.log(2)) > 1e-3
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert adapter < bytes_of(base, model) - bytes_of(base) < 2 * adapter


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing")  # by PEFT and TRL
def test_the_whole_job(smollm2: Path, tmp_path: Path) -> None:
    outcome = preference.main(steps=4, held_out_pairs=4, out=tmp_path)
    assert outcome.before == pytest.approx(math.log(2), rel=1e-5)
    assert outcome.after < outcome.before - 0.01
    assert outcome.after_by_hand == pytest.approx(outcome.after, rel=1e-4)
    adapter = 4 * lora_fx.plan(preference.SPEC, smollm2).trainable
    assert adapter <= outcome.bytes - outcome.base_bytes < 1.01 * adapter
    with safe_open(tmp_path / "adapter" / "policy" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 30 * 4 * 2
