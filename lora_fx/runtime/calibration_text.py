"""Batches of a text file, for inits that look at data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError

_LENGTH = 512


def text_batches(
    file: Path, place: Mapping[str, Any] | None, model: nn.Module
) -> list[dict[str, Tensor]]:
    """Return the tokens of a file as samples of up to 512, each with itself as labels.

    All of it in order, one sample a batch, without a last one of less than two tokens. The
    tokenizer is the one that lies with the model, at `place`. Raises LoraFxError if the file cannot
    be read, has nothing in it, or if there is no tokenizer.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(f"`{file}` cannot be read", str(error)) from error
    ids = torch.tensor(_tokenizer(place)(text)["input_ids"], dtype=torch.int64)
    length = min(
        _LENGTH, getattr(getattr(model, "config", None), "max_position_embeddings", _LENGTH)
    )
    samples = [one[None] for one in ids.split(length) if len(one) > 1]
    if not samples:
        raise _fault(f"there is no text in `{file}`")
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in samples
    ]


def _tokenizer(place: Mapping[str, Any] | None) -> Any:
    from transformers import AutoTokenizer

    if place is None:
        raise _fault("a text needs the model's tokenizer, and nothing says where the model lies")
    try:
        return AutoTokenizer.from_pretrained(
            place["path"], revision=place["revision"], trust_remote_code=place["trust_remote_code"]
        )
    except Exception as error:  # whatever comes of files that are no tokenizer
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _fault(f"`{place['path']}` has no tokenizer that can be read", reason) from error


def _fault(message: str, *notes: str) -> LoraFxError:
    return LoraFxError((Diagnostic("calibration-data", message, notes=notes),))
