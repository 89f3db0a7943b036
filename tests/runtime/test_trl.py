"""TRL's `SFTTrainer` takes the compiled model without a `peft_config`."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lora_fx
from tests.adapters.peft.both import assert_same_logits, from_folder
from tests.runtime.trainer import base, loss
from tests.tiny import spec

WHO = ["cat", "dog", "bird"]
WHAT = ["sees", "hears", "follows"]
WORDS = ["<pad>", "<eos>", "the", *WHO, *WHAT, "and", "then", "sleeps", "again"]
TEXTS = [f"the {a} {verb} the {b} and then sleeps again" for a in WHO for b in WHO for verb in WHAT]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def sft(model: nn.Module, out: Path) -> SFTTrainer:
    settings = SFTConfig(
        str(out),
        per_device_train_batch_size=5,
        max_steps=10,
        save_steps=5,
        learning_rate=1e-2,
        max_length=16,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
    )
    texts = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(
        model, settings, train_dataset=texts, eval_dataset=texts, processing_class=tokenizer()
    )


def compiled() -> nn.Module:
    text = spec(adapter="rank = 4 alpha = 6 dropout = 0.1")
    return lora_fx.compile(base(), text, backend="eager")


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_\\w+)?` is deprecated")  # TRL's
def test_train_save_resume(tmp_path: Path) -> None:
    model = compiled()
    run = sft(model, tmp_path)
    first = loss(run)
    run.train()
    assert loss(run) < 0.8 * first
    run.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "model.safetensors").exists()
    assert_same_logits(from_folder(tmp_path / "final", base()), model)
    resumed = compiled()
    sft(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(torch.equal(dict(resumed.named_parameters())[n], p) for n, p in trained.items())
