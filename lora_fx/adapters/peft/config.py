"""What an `adapter_config.json` says of each module; the rules are PEFT's documented ones."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_fx.adapters.site import Arithmetic
from lora_fx.graph.structure import ACTIVATION

_REFUSED_WHEN_SET = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "use_qalora",
    "velora_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "megatron_config",
    "fan_in_fan_out",
)
_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Name every setting that this version cannot honour, as `key = value`."""
    refused = []
    if config.get("peft_type", "LORA") != "LORA":
        refused.append(f"peft_type = {config['peft_type']!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias = {config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        refused.append(f"init_lora_weights = {init!r}")
    refused += [f"{key} = {config[key]!r}" for key in _REFUSED_WHEN_SET if config.get(key)]
    return refused


def targets(config: Mapping[str, Any], modules: Iterable[str], linears: frozenset[str]) -> set[str]:
    """Return the fqns that the config adapts, of all module fqns of the base model.

    `linears` are the linear layers but the output head, which is what `all-linear` means.
    """
    wanted = config.get("target_modules") or ()
    excluded = config.get("exclude_modules") or ()
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        chosen = set(linears)
    elif isinstance(wanted, str):
        chosen = {fqn for fqn in modules if re.fullmatch(wanted, fqn)}
    else:
        chosen = {
            fqn
            for fqn in modules
            if fqn in wanted or (_ends_with(fqn, wanted) and _in_layers(config, fqn))
        }
    if isinstance(excluded, str):
        return {fqn for fqn in chosen if not re.fullmatch(excluded, fqn)}
    return {fqn for fqn in chosen if not (fqn in excluded or _ends_with(fqn, excluded))}


def rank(config: Mapping[str, Any], fqn: str) -> int:
    """Return the rank of a module: the first `rank_pattern` that fits, else `r`."""
    return _first(config.get("rank_pattern"), fqn, config.get("r", 8))


def arithmetic(config: Mapping[str, Any], fqn: str) -> Arithmetic:
    """Return how a module's branch computes: α/r, or α/√r with `use_rslora`."""
    alpha = _first(config.get("alpha_pattern"), fqn, config.get("lora_alpha", 8))
    r = rank(config, fqn)
    rslora = bool(config.get("use_rslora"))
    scaling = alpha / math.sqrt(r) if rslora else alpha / r
    dropout = float(config.get("lora_dropout", 0.0))
    return Arithmetic(alpha, scaling, rslora, dropout, ACTIVATION)


def replication(config: Mapping[str, Any]) -> list[int] | None:
    """Return the old index of every layer after `layer_replication`, or None without one."""
    ranges = config.get("layer_replication")
    return [i for start, end in ranges for i in range(start, end)] if ranges else None


def _first(patterns: Mapping[str, Any] | None, fqn: str, otherwise: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", fqn):
            return value
    return otherwise


def _ends_with(fqn: str, suffixes: Iterable[str]) -> bool:
    return any(fqn == suffix or fqn.endswith(f".{suffix}") for suffix in suffixes)


def _in_layers(config: Mapping[str, Any], fqn: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    index = _layer_index(config.get("layers_pattern"), fqn)
    return index == wanted if isinstance(wanted, int) else index in wanted


def _layer_index(patterns: str | list[str] | None, fqn: str) -> int | None:
    """Read the number after the stack's name; without patterns any name inside another will do."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", fqn)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", fqn)
        if found:
            return int(found["idx"])
    return None
