"""`Trainer` on mixed batches: data sets of several adapters as one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.runtime.trainer import base
from tests.tiny import VOCABULARY

SPEC = """lora 1
adapter up   { rank = 4  alpha = 8  seed = 1  target linear }
adapter down { rank = 3  alpha = 6  seed = 2  target linear }
adapter idle { rank = 2  target q_proj }
route { train = true }
"""


class Counting(Dataset):
    """Sequences of nine tokens that count in steps, for one adapter."""

    def __init__(self, step: int, adapter: str) -> None:
        self.step, self.adapter = step, adapter

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = (7 * index + self.step * torch.arange(9)) % (VOCABULARY - 1) + 1
        return {"input_ids": ids, "labels": ids, "adapter_names": self.adapter}


def run(model: Any, out: Path, data: Dataset, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=5,
        learning_rate=2e-2, weight_decay=0.1, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False, seed=3, **settings,
    )  # fmt: skip
    collate = lora_fx.RoutedCollator(default_data_collator)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collate)


def loss_of(model: Any, step: int, adapter: str) -> float:
    data = [Counting(step, "")[i]["input_ids"] for i in range(12)]
    ids = torch.stack(data)
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids, adapter_names=[adapter] * 12).loss.item()


@pytest.mark.parametrize("recompute", [False, True])
def test_each_adapter_learns_its_own_data(tmp_path: Path, recompute: bool) -> None:
    model = lora_fx.compile(base(), SPEC, backend="eager")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    data = ConcatDataset([Counting(1, "up"), Counting(-1, "down")])
    trainer = run(model, tmp_path, data, activation_checkpointing=recompute)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * first
    for step, right, wrong in ((1, "up", "down"), (-1, "down", "up")):
        own = loss_of(model, step, right)
        assert own < 0.8 * loss_of(model, step, "__base__")
        assert own < 0.8 * loss_of(model, step, wrong)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all({"up", "down"} & set(name.split(".")) for name in moved)


def test_one_at_a_time_is_the_same(tmp_path: Path) -> None:
    """Batches of one adapter, by names and by the active adapter."""
    by_names, active = (lora_fx.compile(base(), SPEC, backend=None) for _ in range(2))
    run(by_names, tmp_path / "a", Counting(-1, "down")).train()
    active.set_adapter("down")
    trainer = run(active, tmp_path / "b", Counting(-1, "down"))
    trainer.data_collator = lambda samples: default_data_collator(
        [{k: v for k, v in one.items() if k != "adapter_names"} for one in samples]
    )
    trainer.train()
    for (name, one), other in zip(by_names.named_parameters(), active.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_a_sample_without_a_name_is_refused() -> None:
    collate = lora_fx.RoutedCollator(default_data_collator, "who")
    samples = [{"input_ids": [1, 2], "who": "up"}, {"input_ids": [3, 4]}]
    with pytest.raises(LoraFxError, match="1 of 2 samples have no `who`"):
        collate(samples)
    assert collate(samples[:1])["who"] == ["up"]
