"""Train on preferences (DPO) with policy and reference on one base, whose weights lie there once.

TRL's trainer takes the compiled model as the policy and the base itself as the reference.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from memory import bytes_of
from prepare_smollm2 import prepare
from python_topics import Paragraph, split
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

import lora_fx

SPEC = Path(__file__).parent / "preference.lora"
OUT = Path(__file__).parents[1] / "out" / "preference"
BETA = 0.1


@dataclass(frozen=True)
class Outcome:
    """Losses on held-out pairs, by TRL and worked out here, and bytes of weights."""

    before: float
    after: float
    after_by_hand: float
    base_bytes: int
    bytes: int


def main(steps: int = 16, held_out_pairs: int = 16, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the policy, a PEFT folder, in `out`."""
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model = lora_fx.compile(base, SPEC)  # after the move, so that both stay on one storage

    training, held_out = map(pairs, split())
    trainer = trainer_of(model, base, tokenizer, training, held_out[:held_out_pairs], steps, out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    batches = list(trainer.get_eval_dataloader())
    by_hand = torch.stack([preference_loss(model, batch) for batch in batches]).mean().item()
    model.save_pretrained(out / "adapter")
    outcome = Outcome(before, after, by_hand, bytes_of(base), bytes_of(base, model))
    report(outcome, steps)
    print(f"The policy is in {out / 'adapter'}")
    return outcome


def pairs(paragraphs: Sequence[Paragraph]) -> list[dict[str, str]]:
    """Prefer the end of a paragraph to that of one from another chapter."""
    made = []
    for index, paragraph in enumerate(paragraphs):
        other = next(
            p for p in (*paragraphs[index + 1 :], *paragraphs) if p.topic != paragraph.topic
        )
        words = paragraph.text.split()
        half = min(len(words) // 2, 24)  # TRL drops a pair whose prompt alone fills `max_length`
        made.append(
            {
                "prompt": " ".join(words[:half]),
                "chosen": " " + " ".join(words[half : half + 24]),
                "rejected": " " + " ".join(other.text.split()[-24:]),
            }
        )
    return made


def trainer_of(
    model: nn.Module,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    training: list[dict[str, str]],
    held_out: list[dict[str, str]],
    steps: int,
    out: Path,
) -> DPOTrainer:
    settings = DPOConfig(
        str(out / "trainer"),
        beta=BETA,
        max_steps=steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=5e-4,
        max_length=96,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=7,
    )
    return DPOTrainer(
        model,
        ref_model=base,
        args=settings,
        train_dataset=Dataset.from_list(training),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )


@torch.no_grad()
def preference_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290, eq. 7; the reference is the model's own base."""
    policy = log_probabilities(model.eval(), batch)
    with model.disable_adapter():
        reference = log_probabilities(model, batch)
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the log-probability of each completion, (samples,): all chosen, then all rejected."""
    tokens = batch["input_ids"]
    logits = model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits
    each = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (each * batch["completion_mask"][:, 1:]).sum(-1)


def report(outcome: Outcome, steps: int) -> None:
    losses = Table("held-out pairs", "loss")
    losses.add_row("before: policy and reference are the same", f"{outcome.before:.4f}")
    losses.add_row(f"after {steps} steps", f"{outcome.after:.4f}")
    losses.add_row("worked out with `disable_adapter()`", f"{outcome.after_by_hand:.4f}")
    memory = Table("weights in memory", "MB")
    memory.add_row("base", f"{outcome.base_bytes / 1e6:.1f}")
    memory.add_row("reference and policy", f"{outcome.bytes / 1e6:.1f}")
    console = Console()
    console.print(losses)
    console.print(memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    main(steps=parser.parse_args().steps)
