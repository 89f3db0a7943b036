"""Train an adapter for each of three topics in one run of mixed batches, and let them answer."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prepare_smollm2 import prepare
from questions import TOPICS, Question, split
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

import lora_fx

SPEC = Path(__file__).parent / "topics.lora"
OUT = Path(__file__).parents[1] / "out" / "topics"
BASE = "__base__"
LENGTH = 80
Losses = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Outcome:
    """Held-out loss in nats per token of an answer, by topic and adapter, and what is answered."""

    losses: Losses
    answers: list[tuple[Question, str, str]]


def main(steps: int = 40, held_out_each: int = 24, out: Path = OUT) -> Outcome:
    """Run the whole job and leave the adapters, three PEFT folders, in `out`."""
    folder = prepare()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training, held_out = split()
    held_out = [one for topic in TOPICS for one in _of(topic, held_out)[:held_out_each]]

    model = lora_fx.compile(base, SPEC)
    model.print_trainable_parameters()
    train(model, Samples(training, tokenizer), steps, out / "trainer")
    model.save_pretrained(out / "adapters")
    losses = held_out_losses(model, Samples(held_out, tokenizer))
    outcome = Outcome(losses, answers(model, tokenizer, [_of(t, held_out)[1] for t in TOPICS]))
    report(outcome, steps)
    print(f"The adapters are in {out / 'adapters'}")
    return outcome


def _of(topic: str, questions: Iterable[Question]) -> list[Question]:
    return [question for question in questions if question.topic == topic]


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Questions as tokens, with the adapter that each is for; only answers have labels."""

    def __init__(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> None:
        self.questions, self._tokenizer = questions, tokenizer

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        question = self.questions[index]
        asked = asking(question)
        answered = [*asked, {"role": "assistant", "content": question.answer}]
        tokens = self._tokenizer.apply_chat_template(answered, return_dict=False)[:LENGTH]
        start = self._tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=False
        )
        padding = LENGTH - len(tokens)
        labels = [-100] * len(start) + tokens[len(start) :]
        return {
            "input_ids": [*tokens, *[self._tokenizer.pad_token_id] * padding],
            "attention_mask": [1] * len(tokens) + [0] * padding,
            "labels": [*labels, *[-100] * padding],
            "adapter_names": question.topic,
        }


def asking(question: Question) -> list[dict[str, str]]:
    """Return a question as a conversation that waits for an answer."""
    return [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": question.text},
    ]


collate = lora_fx.RoutedCollator(default_data_collator)


def train(model: PreTrainedModel, samples: Samples, steps: int, folder: Path) -> None:
    """Train with the ordinary Trainer; a batch has questions of all topics, as they come."""
    from transformers import Trainer, TrainingArguments  # imports bitsandbytes

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=12,
        learning_rate=2e-3,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=7,
    )
    Trainer(model, arguments, data_collator=collate, train_dataset=samples).train()


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, samples: Samples) -> Losses:
    """Return the mean loss of each topic's answers by each adapter and by the base.

    Each sample stands in a batch once for each of them.
    """
    model.eval()
    names = (BASE, *TOPICS)
    sums = {(topic, name): torch.zeros(2) for topic in TOPICS for name in names}
    for index in track(range(len(samples)), "held-out answers", console=Console(stderr=True)):
        batch = collate([samples[index] | {"adapter_names": name} for name in names])
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        of_tokens = cross_entropy(logits.transpose(1, 2), labels, reduction="none").cpu()
        counts = (labels != -100).sum(1).cpu()
        topic = samples.questions[index].topic
        for name, loss, count in zip(names, of_tokens.sum(1), counts, strict=True):
            sums[topic, name] += torch.stack((loss, count.float()))
    return {key: (loss / count).item() for key, (loss, count) in sums.items()}


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[tuple[Question, str, str]]:
    """Return each question with what the base and its own adapter answer, all from one batch."""
    asked = [asking(question) for question in questions for _ in range(2)]
    prompts = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    names = [name for question in questions for name in (BASE, question.topic)]
    tokens = model.generate(**prompts, adapter_names=names, max_new_tokens=40, do_sample=False)
    start = prompts["input_ids"].shape[1]
    texts = tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return list(zip(questions, texts[::2], texts[1::2], strict=True))


def report(outcome: Outcome, steps: int) -> None:
    names = (BASE, *TOPICS)
    title = f"loss by adapter, after {steps} steps"
    losses = Table("held-out answers", "base", *TOPICS, title=title)
    for topic in TOPICS:
        row = {name: outcome.losses[topic, name] for name in names}
        best = min(row, key=row.__getitem__)
        cells = (f"[bold]{row[n]:.3f}[/]" if n == best else f"{row[n]:.3f}" for n in names)
        losses.add_row(f"{topic}", *cells)
    texts = Table("question", "base", "its own adapter", show_lines=True)
    for question, by_base, own in outcome.answers:
        asked = f"{question.text}\n({question.topic})"
        texts.add_row(*(Text(text.strip()) for text in (asked, by_base, own)))
    console = Console()
    console.print(losses)
    console.print(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(steps=parser.parse_args().steps)
