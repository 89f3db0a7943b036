from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer


@pytest.mark.real
def test_the_model_knows_what_is_alike(minilm: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    inputs = tokenizer(["a cat", "a kitten", "a stock"], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.6 > 0.3 > mean[0] @ mean[2]
