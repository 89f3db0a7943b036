"""Write one adapter as a PEFT folder."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.site import Site
from lora_fx.spec.peft import names

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def write(
    folder: Path,
    model: nn.Module,
    adapter: str,
    *,
    base: str | None,
    task: str | None,
    replication: list[tuple[int, int]] | None,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; each file appears whole.

    PEFT computes the same function from them: ranks and scalings that differ by module go into
    `rank_pattern` and `alpha_pattern`. Dropout that differs by module cannot be said there; the
    largest is written.
    """
    placed = {fqn: site for fqn, site in storage.sites(model) if adapter in site.lora_arithmetic}
    tensors = adapter_tensors(model, adapter)
    config = describe(placed, adapter, list(storage.base_modules(model)))
    config |= {
        "base_model_name_or_path": base,
        "layer_replication": [list(pair) for pair in replication] if replication else None,
        "task_type": task,
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    replace_file(folder / CONFIG, lambda path: path.write_text(text))


def adapter_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names in a file."""
    return {
        f"{PREFIX}{fqn}.{name}": tensor.detach().contiguous()
        for fqn, site in storage.sites(model)
        if adapter in site.lora_arithmetic
        for name, tensor in storage.tensors(site, adapter).items()
    }


def describe(placed: Mapping[str, Site], adapter: str, modules: list[str]) -> dict[str, Any]:
    """Return the `LoraConfig` fields that give each of these sites its rank and scaling."""
    ranks = {
        fqn: storage.tensors(site, adapter)["lora_A.weight"].shape[0]
        for fqn, site in placed.items()
    }
    settings = {fqn: site.lora_arithmetic[adapter] for fqn, site in placed.items()}
    rslora = names.commonest(a.rslora for a in settings.values())
    alphas = {
        fqn: names.alpha_of(a.alpha, a.scaling, ranks[fqn], rslora) for fqn, a in settings.items()
    }
    r, alpha = names.commonest(ranks.values()), names.commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": names.pattern_values(ranks, r),
        "lora_alpha": alpha,
        "alpha_pattern": names.pattern_values(alphas, alpha),
        "use_rslora": rslora,
        "lora_dropout": max(a.dropout for a in settings.values()),
        "target_modules": names.targets(list(placed), modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Let `write_to` write a file beside `path` and move it there once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
