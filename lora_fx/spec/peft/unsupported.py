"""Settings of a PEFT config that the language has no word for."""

from collections.abc import Iterator
from typing import Any

from lora_fx.spec.peft.attributes import attribute_faults
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.config_faults import Fault

_SAID = (
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora"),
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("use_dora", "alora_invocation_tokens", "velora_config", "kasa_config"),
    *("monteclora_config", "use_bdlora", "bias", "lora_bias", "ensure_weight_tying"),
    *("base_model_name_or_path", "revision", "runtime_config", "task_type", "peft_type"),
)
# What says nothing about the adapter: where it came from, how a saved one is opened, what PEFT
# corrects by the layer's class, and what matters only beside a setting that is refused.
_SILENT = (
    *("peft_version", "auto_mapping", "inference_mode", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size"),
)
_VARIANTS = (
    *("use_dora", "alora_invocation_tokens", "velora_config", "kasa_config"),
    *("monteclora_config", "use_bdlora"),
)


def unsupported(config: PeftConfig) -> list[Fault]:
    """Return a fault for every setting that the language cannot say."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        return [Fault("peft_type", f"`peft_type = {kind!r}` is not LoRA")]
    return [*_unknown(config), *_variants(config), *attribute_faults(config)]


def _unknown(config: PeftConfig) -> Iterator[Fault]:
    for key, value in config.values.items():
        if key not in _SAID and key not in _SILENT and _says_something(value):
            yield Fault(key, _said_of(key, value))


def _said_of(key: str, value: Any) -> str:
    if key == "arrow_config":
        return "`arrow_config` is no adapter, but routes tokens: write `route { by = arrow(…) }`"
    return f"`{key} = {value!r}` has no counterpart in the language"


def _variants(config: PeftConfig) -> Iterator[Fault]:
    variants = [key for key in _VARIANTS if _is_on(config.get(key))]
    for key in variants[1:]:
        yield Fault(key, f"`{key}` and `{variants[0]}` are two variants; a layer has one")


def _is_on(value: Any) -> bool:
    """Whether a variant's setting turns it on: an object of settings does even when empty."""
    return isinstance(value, dict) or bool(value)


def _says_something(value: Any) -> bool:
    return value is not False and value not in (None, "", {}, [])
