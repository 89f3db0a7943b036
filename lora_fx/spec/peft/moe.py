"""Configs for experts that were one linear layer each, on models that stack them.

transformers 5 holds the experts of a layer as stacked parameters, two projections fused into one.
PEFT reads a config for the old names as one for the parameters, and so does this: where both
fused projections are targeted, the parameter gets the rank and alpha of both.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.matching import targets
from lora_fx.spec.peft.model import Model

_NEW_NAMES = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
_FUSED = "gate_up_proj"

# The model types whose experts transformers stacks, by the names that these had.
STACKED = {
    "mixtral": ("mixtral", "minimax", "minimax_m2"),
    "qwen2_moe": (
        *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
        *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "longcat_flash"),
        *("solar_open", "mellum", "qwen3_moe", "beam", "qwen3_omni_moe"),
        *("qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe"),
        *("flex_olmo", "olmoe", "exaone_moe", "cohere2_moe"),
    ),
}


def with_stacked_experts(config: PeftConfig, model: Model) -> PeftConfig:
    """Return the config with the experts' old names as parameters, on a model that stacks them.

    Raises LoraFxError if it targets one of two projections that are one parameter now.
    """
    new_names = next((_NEW_NAMES[old] for old, types in STACKED.items() if model.type in types), {})
    wanted = config.get("target_modules")
    if not new_names or wanted is None:
        # PEFT does not look for default targets here.
        nothing = {"target_modules": []} if new_names and config.get("target_parameters") else {}
        return replace(config, values={**config.values, **nothing})
    names = _leaves(config, model, new_names) if isinstance(wanted, str) else list(wanted)
    if not names:
        return config
    moved = {name: old for name in names for old in new_names if _is(name, old)}
    if not moved:
        return replace(config, values={**config.values, "target_modules": names})
    stacked = sorted({new_names[old] for old in moved.values()})
    values = {
        **config.values,
        "target_modules": [name for name in names if name not in moved],
        "target_parameters": [*dict.fromkeys([*config.get("target_parameters", ()), *stacked])],
    }
    fused = [old for old, new in new_names.items() if new == _FUSED]
    present = [old for old in fused if old in moved.values()]
    if present and present != fused:
        raise _half_of_a_parameter(config, present, fused)
    if present:
        values |= _of_both(config, len(fused))
    return replace(config, values=values)


def taken_for_experts(name: str, model_type: str | None) -> bool:
    """Whether PEFT takes the name of a module for that of stacked experts on such a model."""
    olds = (old for old, types in STACKED.items() if model_type in types)
    return any(_is(name, one) for old in olds for one in _NEW_NAMES[old])


def _of_both(config: PeftConfig, count: int) -> dict[str, Any]:
    key = rf".*\.{_FUSED}"
    return {
        "rank_pattern": {**config.get("rank_pattern", {}), key: count * config.get("r", 8)},
        "alpha_pattern": {
            **config.get("alpha_pattern", {}),
            key: count * config.get("lora_alpha", 8),
        },
    }


def _leaves(config: PeftConfig, model: Model, new_names: Mapping[str, str]) -> list[str]:
    """Return the last parts of the names that a regex, or `all-linear`, is about, old ones too."""
    if config.get("target_modules").lower() == "all-linear":
        return sorted({name.rpartition(".")[2] for name in model.linears} | set(new_names))
    names = [*model.modules, *model.parameters]
    for parameter in model.parameters:
        module, _, leaf = parameter.rpartition(".")
        names += [f"{module}.{old}" for old, new in new_names.items() if new == leaf]
    return sorted({name.rpartition(".")[2] for name in targets(config.values, names, frozenset())})


def _is(name: str, old: str) -> bool:
    return re.fullmatch(rf"(.*\.)?{old}", name) is not None


def _half_of_a_parameter(config: PeftConfig, present: list[str], fused: list[str]) -> LoraFxError:
    listed = " and ".join(f"`{name}`" for name in fused)
    message = f"`{present[0]}` alone cannot be adapted: {listed} are one parameter, `{_FUSED}`"
    help = f"name {listed} both in `target_modules`"
    return LoraFxError(
        (config.diagnostic("peft-unsupported", "target_modules", message, help=help),)
    )
