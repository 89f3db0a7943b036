from pathlib import Path

import prepare_smollm2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_rotary_rows_of_each_head_come_apart() -> None:
    interleaved = torch.tensor([[0], [3], [1], [4], [2], [5]])  # pairs (0, 3), (1, 4), (2, 5)
    heads = torch.cat([interleaved, 10 + interleaved])
    halves = prepare_smollm2.split_rotary_halves(heads, head_dim=6)
    assert halves.flatten().tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]


@pytest.mark.real
def test_the_model_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(tokens[0, -1]) == " Paris"
