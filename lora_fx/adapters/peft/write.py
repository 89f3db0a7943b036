"""Write one adapter as a PEFT folder."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

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
    rslora = _commonest([a.rslora for a in settings.values()])
    alphas = {fqn: _alpha(settings[fqn], ranks[fqn], rslora) for fqn in placed}
    r, alpha = _commonest(list(ranks.values())), _commonest(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_only(fqn, placed): n for fqn, n in ranks.items() if n != r},
        "lora_alpha": alpha,
        "alpha_pattern": {_only(fqn, placed): a for fqn, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "lora_dropout": max(a.dropout for a in settings.values()),
        "target_modules": _targets(list(placed), modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _alpha(arithmetic: Arithmetic, rank: int, rslora: bool) -> float:
    """Return the alpha that gives this scaling under the folder's one `use_rslora`."""
    divisor = math.sqrt(rank) if rslora else rank
    says_it = arithmetic.alpha / divisor == arithmetic.scaling
    alpha = arithmetic.alpha if says_it else arithmetic.scaling * divisor
    return int(alpha) if float(alpha).is_integer() else alpha


def _targets(chosen: list[str], modules: list[str]) -> list[str] | str:
    """Leaf names if they select exactly the chosen modules, else full names, else a pattern."""
    for names in ({fqn.rpartition(".")[2] for fqn in chosen}, set(chosen)):
        selected = {fqn for fqn in modules if any(_is_or_ends_with(fqn, name) for name in names)}
        if selected == set(chosen):
            return sorted(names)
    return "|".join(re.escape(fqn) for fqn in sorted(chosen))


def _only(fqn: str, placed: Iterable[str]) -> str:
    """Return a pattern for this module; a bare name is also that of every name that ends in it."""
    others = any(other != fqn and _is_or_ends_with(other, fqn) for other in placed)
    return f"^{fqn}" if others else fqn


def _is_or_ends_with(fqn: str, name: str) -> bool:
    return fqn == name or fqn.endswith(f".{name}")


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Let `write_to` write a file beside `path` and move it there once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
