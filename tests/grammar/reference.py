"""The language reference: its blocks, its tables, and the models that its blocks are for."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.architectures import on_meta

GRAMMAR = Path(__file__).parent.parent.parent / "grammar"
REFERENCE = (GRAMMAR / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```lora ?(\S*)\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL
)
"""What stands behind `lora` is the file that the block is, or the architecture that it is for."""


def section(title: str) -> str:
    return REFERENCE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def columns(heading: str) -> Iterator[str]:
    """The cells of every table under a heading that begins so."""
    for table in re.findall(r"(?:^\|.*\n)+", REFERENCE, re.MULTILINE):
        titles, _, *rows = (
            [cell.strip() for cell in line.split("|")] for line in table.splitlines()
        )
        for i, title in enumerate(titles):
            if title.startswith(heading):
                yield from (row[i] for row in rows)


def rows(name: str) -> list[list[str]]:
    """The cells of every row of a table that begins with a code word."""
    lines = (line for line in REFERENCE.splitlines() if re.match(rf"\| `{name}[`(]", line))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def model(name: str) -> nn.Module:
    """The model that a block is for, on meta; a Llama of 32 wide layers where it names none."""
    if name and not name.endswith(".lora"):
        return on_meta(name)
    config = LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=32)
    with torch.device("meta"):
        return LlamaForCausalLM(config)
