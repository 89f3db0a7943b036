"""The model card of an adapter folder: a README that the hub can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData

NAME = "README.md"


def write_card(folder: Path, config: Mapping[str, Any], earlier: Path) -> None:
    """Write the card of the adapter with this PEFT config, with the text of an earlier one.

    Base model, library, tags and pipeline are those that PEFT writes. A base that is a folder of
    this machine is not named.
    """
    base = config.get("base_model_name_or_path")
    base = None if base is None or Path(base).exists() else base
    card = ModelCard.load(earlier / NAME) if (earlier / NAME).exists() else ModelCard(_text(base))
    data = cast(ModelCardData, card.data)
    data.library_name = "peft"
    tags = {*(data.tags or ()), "lora", "transformers"}
    if base is not None:
        data.base_model = base
        tags.add(f"base_model:adapter:{base}")
    data.tags = sorted(tags)
    if data.pipeline_tag is None and config.get("task_type") == "CAUSAL_LM":
        data.pipeline_tag = "text-generation"
    (folder / NAME).write_text(str(card), encoding="utf-8")


def _text(base: str | None) -> str:
    named = f" of [{base}](https://huggingface.co/{base})" if base else ""
    data = ModelCardData(library_name="peft").to_yaml()
    return f"""---
{data}
---

# LoRA adapter

An adapter{named}, written by lora_fx. Give the base model and this folder to
`lora_fx.load(folder, base)` or to `peft.PeftModel.from_pretrained(base, folder)`.
"""
