"""Teach a GPT-2 two new tokens, and compute the same with PEFT from the saved folder.

No package carries a real GPT-2, so this one is tiny and random. It learns to answer which of three
digits was the first, or the last: after `3 1 4 <first>` comes 3, after `3 1 4 <last>` comes 4.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx

SPEC = Path(__file__).parent / "new_tokens.lora"
OUT = Path(__file__).parents[1] / "out" / "new_tokens"
FIRST, LAST = 10, 11  # the other tokens are the digits
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Outcome:
    """Shares of right answers, and how far PEFT's logits are from ours, relative to the largest."""

    before: float
    after: float
    difference: float


def main(steps: int = 60, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the adapter, a PEFT folder, in `out`."""
    base = tiny_gpt2()
    training, held_out = split()
    model = lora_fx.compile(base, SPEC)
    model.print_trainable_parameters()
    before = accuracy(model, held_out)
    train(model, training, steps)
    after = accuracy(model, held_out)
    model.save_pretrained(out)

    ours = lora_fx.load(out, base=base, backend=None)
    theirs = PeftModel.from_pretrained(tiny_gpt2(), out)
    outcome = Outcome(before, after, difference(ours, theirs, held_out))
    report(outcome, steps)
    print(f"The adapter is in {out}")
    return outcome


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_positions=8,
        vocab_size=12,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def split() -> tuple[Tensor, Tensor]:
    """Return questions with their answers, (n, 5) tokens, to train on and held-out ones."""
    numbers = torch.arange(1000)
    digits = torch.stack([numbers // 100, numbers // 10 % 10, numbers % 10], 1)
    asked = [
        torch.cat([digits, torch.full((1000, 1), token), digits[:, place : place + 1]], 1)
        for token, place in ((FIRST, 0), (LAST, 2))
    ]
    held_out = numbers % HELD_OUT_EVERY == numbers // 100
    return torch.cat([a[~held_out] for a in asked]), torch.cat([a[held_out] for a in asked])


def train(model: nn.Module, questions: Tensor, steps: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    order = torch.Generator().manual_seed(7)
    model.train()
    for step in range(steps):
        tokens = questions[torch.randint(len(questions), (64,), generator=order)]
        labels = tokens.masked_fill(torch.arange(5) < 4, -100)  # only the answer counts
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, questions: Tensor) -> float:
    logits = model.eval()(input_ids=questions[:, :4]).logits[:, -1]
    return (logits.argmax(-1) == questions[:, 4]).float().mean().item()


@torch.no_grad()
def difference(ours: nn.Module, theirs: nn.Module, questions: Tensor) -> float:
    a, b = (model.eval()(input_ids=questions).logits for model in (ours, theirs))
    return ((a - b).abs().max() / b.abs().max()).item()


def report(outcome: Outcome, steps: int) -> None:
    table = Table("", "right answers")
    table.add_row("before", f"{outcome.before:.0%}")
    table.add_row(f"after {steps} steps", f"{outcome.after:.0%}")
    Console().print(table)
    print(f"PEFT's logits from the same folder differ by {outcome.difference:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(steps=parser.parse_args().steps)
