"""Make a language model deeper without new weights, train its seam and let it write."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from memory import bytes_of
from prepare_smollm2 import prepare
from python_docs import split
from quickstart import mean_loss, train, write
from rich.console import Console
from rich.table import Table
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_fx

SPEC = Path(__file__).parent / "upscale.lora"
OUT = Path(__file__).parents[1] / "out" / "upscale"


@dataclass(frozen=True)
class Outcome:
    """Losses on held-out text in nats per token, bytes of weights, and what is written."""

    base: float
    before: float
    after: float
    base_bytes: int
    bytes: int
    text: str


def main(steps: int = 30, held_out_blocks: int = 16, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the adapter, a PEFT folder, in `out`."""
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training, held_out = split(tokenizer, length=64)
    held_out = Subset(held_out, range(held_out_blocks))

    model = lora_fx.compile(base, SPEC)
    print(f"{len(base.model.layers)} layers became {len(model.model.layers)}")
    of_base = mean_loss(base, held_out, "loss of the base")
    before = mean_loss(model, held_out, "loss before")
    train(model, training, steps, out / "trainer")
    after = mean_loss(model, held_out, "loss after")
    model.save_pretrained(out / "adapter")
    outcome = Outcome(
        of_base, before, after, bytes_of(base), bytes_of(base, model), write(model, tokenizer)
    )
    report(outcome, steps)
    print(f"The adapter is in {out / 'adapter'}")
    return outcome


def report(outcome: Outcome, steps: int) -> None:
    table = Table("", "loss", "weights, MB")
    table.add_row("base", f"{outcome.base:.3f}", f"{outcome.base_bytes / 1e6:.0f}")
    table.add_row(
        "up-scaled", f"{outcome.before:.3f}", f"{outcome.bytes / 1e6:.0f} with the base's"
    )
    table.add_row(f"after {steps} steps", f"{outcome.after:.3f}", "")
    console = Console()
    console.print(table)
    console.print(outcome.text.strip(), markup=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    main(steps=parser.parse_args().steps)
