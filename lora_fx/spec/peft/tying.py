"""`ensure_weight_tying`: what is tied to the embedding shares the embedding's adapter."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.matching import ends_with
from lora_fx.spec.peft.model import Model

_EMBEDDINGS = ("embed_tokens", "lm_head")  # the names that PEFT looks for


def with_tied_embedding(config: PeftConfig, model: Model) -> PeftConfig:
    """Return the config with the input embedding in place of the modules that share its weight."""
    if not (config.get("ensure_weight_tying") and model.embedding and model.tied):
        return config
    saved, wanted = config.get("modules_to_save", []), config.get("target_modules", [])
    changed: Mapping[str, Any] = {}
    if _names_an_embedding(saved):
        changed = {"modules_to_save": _embedding_first(saved, model.embedding, model)}
    elif isinstance(wanted, str) and any(re.fullmatch(wanted, name) for name in _EMBEDDINGS):
        tied = "|".join(map(re.escape, sorted(model.tied)))
        pattern = rf"(?!(?:{tied})$)(?:{wanted}|{re.escape(model.embedding)})"
        changed = {"target_modules": pattern}
    elif isinstance(wanted, list) and _names_an_embedding(wanted):
        changed = {"target_modules": _embedding_first(wanted, model.embedding, model)}
    return replace(config, values={**config.values, **changed})


def _names_an_embedding(names: list[str]) -> bool:
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in names)


def _embedding_first(names: list[str], embedding: str, model: Model) -> list[str]:
    kept = [name for name in names if not any(ends_with(tied, [name]) for tied in model.tied)]
    return kept if ends_with(embedding, kept) else [embedding, *kept]
