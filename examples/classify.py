"""Teach a small BERT which chapter of Python's reference a paragraph is from, save it, load it."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from prepare_minilm import prepare
from python_topics import TOPICS, Paragraph, split
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lora_fx

SPEC = Path(__file__).parent / "classify.lora"
OUT = Path(__file__).parents[1] / "out" / "classify"


@dataclass(frozen=True)
class Outcome:
    """Shares of the held-out paragraphs whose topic is told right."""

    before: float
    after: float
    reloaded: float


def main(steps: int = 60, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the adapter with its head, a PEFT folder, in `out`."""
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    training, held_out = split()

    model = lora_fx.compile(read(folder, seed=1), SPEC)
    model.print_trainable_parameters()
    before = accuracy(model, tokenizer, held_out)
    train(model, tokenizer, training, steps)
    after = accuracy(model, tokenizer, held_out)
    model.save_pretrained(out)

    again = lora_fx.load(out, base=read(folder, seed=2))  # another new head: ours is in the folder
    outcome = Outcome(before, after, reloaded=accuracy(again, tokenizer, held_out))
    report(outcome, steps, len(held_out))
    print(f"The adapter is in {out}")
    return outcome


def read(folder: Path, seed: int) -> PreTrainedModel:
    """Return the encoder with a new head on it."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS))


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paragraphs: Sequence[Paragraph],
    steps: int,
    samples: int = 16,
) -> None:
    """Train in a loop: nothing needs to know that there are adapters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    order = torch.Generator().manual_seed(7)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(paragraphs), (samples,), generator=order).tolist()
        loss = model(**batch(tokenizer, [paragraphs[i] for i in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[Paragraph]
) -> float:
    model.eval()
    right = 0
    starts = range(0, len(paragraphs), 16)
    for start in track(starts, "held-out paragraphs", console=Console(stderr=True)):
        inputs = batch(tokenizer, paragraphs[start : start + 16])
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(paragraphs)


def batch(
    tokenizer: PreTrainedTokenizerBase, paragraphs: Sequence[Paragraph], length: int = 64
) -> dict[str, Tensor]:
    texts = [paragraph.text for paragraph in paragraphs]
    tokens = tokenizer(
        texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt"
    )
    return {**tokens, "labels": torch.tensor([paragraph.topic for paragraph in paragraphs])}


def report(outcome: Outcome, steps: int, count: int) -> None:
    table = Table("", f"right, of {count} held-out paragraphs")
    table.add_row("before", f"{outcome.before:.0%}")
    table.add_row(f"after {steps} steps", f"{outcome.after:.0%}")
    table.add_row("saved and loaded", f"{outcome.reloaded:.0%}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(steps=parser.parse_args().steps)
