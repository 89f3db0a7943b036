"""Write one adapter as a PEFT folder."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.site import Arithmetic, Site

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
    placed = {
        fqn: site for fqn, site in storage.sites(model) if adapter in site.lora_arithmetic
    }
    tensors = {
        f"{PREFIX}{fqn}.{name}": tensor.detach().contiguous()
        for fqn, site in placed.items()
        for name, tensor in storage.tensors(site, adapter).items()
    }
    config = describe(placed, adapter, list(storage.base_modules(model)))
    config |= {
        "base_model_name_or_path": base,
        "layer_replication": [list(pair) for pair in replication] if replication else None,
        "task_type": task,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / TENSORS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    _replace(folder / CONFIG, lambda path: path.write_text(text))


def describe(
    placed: Mapping[str, Site], adapter: str, modules: list[str]
) -> dict[str, Any]:
    """Return the `LoraConfig` fields that give each of these sites its rank and scaling."""
    ranks = {
        fqn: storage.tensors(site, adapter)["lora_A.weight"].shape[0]
        for fqn, site in placed.items()
    }
    settings = {fqn: site.lora_arithmetic[adapter] for fqn, site in placed.items()}
    rslora = _commonest([a.rslora for a in settings.values()])
    alphas = {fqn: _alpha(settings[fqn], ranks[fqn], rslora) for fqn in placed}
    r, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {fqn: n for fqn, n in ranks.items() if n != r},
        "lora_alpha": alpha,
        "alpha_pattern": {fqn: a for fqn, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "lora_dropout": max(a.dropout for a in settings.values()),
        "target_modules": _suffixes(list(placed), modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _alpha(arithmetic: Arithmetic, rank: int, rslora: bool) -> float:
    """The alpha that gives this scaling under the folder's one `use_rslora`."""
    divisor = math.sqrt(rank) if rslora else rank
    says_it = arithmetic.alpha / divisor == arithmetic.scaling
    alpha = arithmetic.alpha if says_it else arithmetic.scaling * divisor
    return int(alpha) if float(alpha).is_integer() else alpha


def _suffixes(chosen: list[str], modules: list[str]) -> list[str]:
    """Leaf names if they select exactly the chosen modules, else the full names."""
    leaves = sorted({fqn.rpartition(".")[2] for fqn in chosen})
    selected = [fqn for fqn in modules if fqn.rpartition(".")[2] in leaves]
    return leaves if sorted(selected) == sorted(chosen) else sorted(chosen)


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _replace(path: Path, write_to: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
