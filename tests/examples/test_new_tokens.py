from pathlib import Path

import new_tokens
import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # by Inductor
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by PEFT
def test_the_whole_job(tmp_path: Path) -> None:
    outcome = new_tokens.main(steps=40, out=tmp_path)
    assert outcome.before < 0.3
    assert outcome.after > 0.9
    assert outcome.difference < 1e-5
    state = load_file(tmp_path / "adapter_model.safetensors")
    rows = state["base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"]
    base = new_tokens.tiny_gpt2().transformer.wte.weight
    assert rows.shape == (2, 64)
    assert not torch.isclose(rows, base[10:]).any(1).all()
    assert state["base_model.model.transformer.wpe.lora_embedding_A"].any()
    assert state["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (8, 64)


def test_answers_are_right() -> None:
    training, held_out = (part.tolist() for part in new_tokens.split())
    assert (len(training), len(held_out)) == (1800, 200)
    assert not {tuple(row[:4]) for row in training} & {tuple(row[:4]) for row in held_out}
    for *digits, question, answer in training + held_out:
        assert answer == digits[0 if question == new_tokens.FIRST else 2]
