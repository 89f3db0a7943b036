"""Write one adapter as a PEFT folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import adapter_tensors, embeddings
from lora_fx.plan.offloaded import values_of
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.to_peft import config_of

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def write(
    folder: Path,
    model: nn.Module,
    plan: AdapterPlan,
    config: Mapping[str, Any],
    save_embedding_layers: bool | Literal["auto"],
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder.

    With `save_embedding_layers` the weights of the input and output embeddings are written too,
    with `auto` if the adapter adapts one of them, as PEFT does.
    """
    tensors = adapter_tensors(model, plan.name)
    ends = embeddings(model, {site.fqn for site in plan.sites})
    adapted = any(".base_layer." in name for name in ends)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and adapted):
        weights = {n: values_of(m, "weight", m.weight).clone() for n, m in ends.items()}  # type: ignore[arg-type]
        tensors = weights | tensors
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def folder_config(
    model: nn.Module, plan: AdapterPlan, layers: Sequence[int] | None
) -> dict[str, Any]:
    """Return the `LoraConfig` fields that give each site the rank and scaling it has now.

    Ranks and scalings that differ by module go into `rank_pattern` and `alpha_pattern`. Dropout
    that differs by module cannot be said there; the largest is written. Raises LoraFxError for
    what PEFT has no names for.
    """
    placed = dict(storage.sites(model))
    current = (placed[site.fqn].lora_arithmetic[plan.name] for site in plan.sites)
    sites = tuple(
        replace(site, alpha=a.alpha, scaling=a.scaling, rslora=a.rslora, dropout=a.dropout)
        for site, a in zip(plan.sites, current, strict=True)
    )
    config = config_of(replace(plan, sites=sites), list(storage.base_modules(model)), layers)
    transposed = any(site.layer.kind == "transposed" for site in plan.sites)
    now = {"fan_in_fan_out": transposed, "inference_mode": True, "init_lora_weights": True}
    return config | now
