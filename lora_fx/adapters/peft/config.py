"""What an `adapter_config.json` says of each module; the rules are PEFT's documented ones."""

import math
from collections.abc import Mapping
from typing import Any

from lora_fx.adapters.site import Arithmetic
from lora_fx.graph.structure import ACTIVATION
from lora_fx.spec.peft.matching import first_fitting

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


def rank(config: Mapping[str, Any], fqn: str) -> int:
    """Return the rank of a module: the first `rank_pattern` that fits, else `r`."""
    return first_fitting(config.get("rank_pattern"), fqn, config.get("r", 8))


def arithmetic(config: Mapping[str, Any], fqn: str) -> Arithmetic:
    """Return how a module's branch computes: α/r, or α/√r with `use_rslora`."""
    alpha = first_fitting(config.get("alpha_pattern"), fqn, config.get("lora_alpha", 8))
    r = rank(config, fqn)
    rslora = bool(config.get("use_rslora"))
    scaling = alpha / math.sqrt(r) if rslora else alpha / r
    dropout = float(config.get("lora_dropout", 0.0))
    return Arithmetic(alpha, scaling, rslora, dropout, ACTIVATION)


def replication(config: Mapping[str, Any]) -> list[int] | None:
    """Return the old index of every layer after `layer_replication`, or None without one."""
    ranges = config.get("layer_replication")
    return [i for start, end in ranges for i in range(start, end)] if ranges else None
