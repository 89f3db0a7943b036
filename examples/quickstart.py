"""Train an adapter on Python's language reference, save it, load it again and let it write."""

import argparse
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from prepare_smollm2 import prepare
from python_docs import split
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lora_fx

SPEC = Path(__file__).parent / "quickstart.lora"
OUT = Path(__file__).parents[1] / "out" / "quickstart"
HEADING = 'The "with" statement\n********************\n\n'


@dataclass(frozen=True)
class Outcome:
    """Losses on the held-out text in nats per token, and what each model makes of `HEADING`."""

    before: float
    after: float
    reloaded: float
    base_text: str
    adapted_text: str


def main(steps: int = 40, held_out_blocks: int = 32, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the adapter, a PEFT folder, in `out`."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel for 4-bit CPU
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training, held_out = split(tokenizer, length=128)
    held_out = Subset(held_out, range(held_out_blocks))

    model = lora_fx.compile(base, SPEC)
    model.print_trainable_parameters()
    print("The first step of each kind compiles its graph, once for all layers.")
    before = mean_loss(model, held_out, "loss before")
    train(model, training, steps, out / "trainer")
    after = mean_loss(model, held_out, "loss after")
    model.save_pretrained(out / "adapter")

    again = lora_fx.load(out / "adapter", base=base)
    outcome = Outcome(
        before,
        after,
        reloaded=mean_loss(again, held_out, "loss reloaded"),
        base_text=write(base, tokenizer),
        adapted_text=write(again, tokenizer),
    )
    report(outcome, steps)
    print(f"The adapter is in {out / 'adapter'}")
    return outcome


def train(model: PreTrainedModel, blocks: Dataset, steps: int, folder: Path) -> None:
    """Train with the ordinary Trainer."""
    from transformers import Trainer, TrainingArguments  # imports bitsandbytes

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=7,
    )
    Trainer(model, arguments, train_dataset=blocks).train()


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: Dataset, label: str) -> float:
    model.eval()
    batches = list(DataLoader(blocks, batch_size=4))
    losses = []
    for batch in track(batches, description=label, console=Console(stderr=True)):
        tokens = {name: tensor.to(model.device) for name, tensor in batch.items()}
        losses.append(model(**tokens, use_cache=False).loss.item())
    return sum(losses) / len(losses)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Continue `HEADING` by the likeliest words."""
    prompt = tokenizer(HEADING, return_tensors="pt").to(model.device)
    tokens = model.eval().generate(**prompt, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def report(outcome: Outcome, steps: int) -> None:
    losses = Table("held-out text", "loss", "perplexity")
    for label, loss in (
        ("before", outcome.before),
        (f"after {steps} steps", outcome.after),
        ("saved and loaded", outcome.reloaded),
    ):
        losses.add_row(label, f"{loss:.4f}", f"{math.exp(loss):.1f}")
    heading = HEADING.splitlines()[0]
    texts = Table("model", f"what it writes under the heading {heading}", show_lines=True)
    texts.add_row("base", Text(outcome.base_text.strip()))
    texts.add_row("adapted", Text(outcome.adapted_text.strip()))
    console = Console()
    console.print(losses)
    console.print(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(steps=parser.parse_args().steps)
