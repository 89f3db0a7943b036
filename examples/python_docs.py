"""English text that needs no download: the language reference inside every Python (`pydoc`)."""

from pydoc_data.topics import topics

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

HELD_OUT_EVERY = 8


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Texts as blocks of equally many tokens, one after another; what is left over is dropped."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        end = f"{tokenizer.eos_token}"
        tokens = torch.tensor(tokenizer("".join(text + end for text in texts))["input_ids"])
        self.tokens_NT = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens_NT[index], "labels": self.tokens_NT[index]}


def split(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Blocks, Blocks]:
    """Return blocks to train on and held-out blocks; no topic is in both."""
    texts = [topics[name] for name in sorted(topics)]
    held_out = texts[::HELD_OUT_EVERY]
    training = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    return Blocks(training, tokenizer, length), Blocks(held_out, tokenizer, length)
