"""A short training run of a tiny model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests.tiny import VOCABULARY, llama


def base() -> nn.Module:
    """Two layers, and weights that are large enough for adapters to reach the logits."""
    return llama(2, initializer_range=0.2)


class Sequences(Dataset):
    """Thirteen sequences of nine tokens, each counting up from another number."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(9) + 7 * index) % (VOCABULARY - 1) + 1
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, out: Path, **settings: Any) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    arguments = TrainingArguments(str(out), **defaults | settings)
    return Trainer(model, arguments, train_dataset=Sequences(), eval_dataset=Sequences())


def loss(run: Trainer) -> float:
    return run.evaluate()["eval_loss"]
