"""The settings of a PEFT config that are attributes of an adapter."""

from collections.abc import Mapping
from typing import Any

from lora_fx.diagnostics import LoraFxError
from lora_fx.spec.attributes import INITS, VARIANTS
from lora_fx.spec.expressions import Value, Word, show
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.rule import Rule, Rules

# Of a method's settings, by PEFT's names: what the language calls each.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "loftq": {"loftq_bits": "bits", "loftq_iter": "iterations"},
    "corda": {"corda_method": "method"},
    "bdlora": {
        "target_modules_bd_a": "a",
        "target_modules_bd_b": "b",
        "nblocks": "blocks",
        "match_strict": "strict",
    },
}
# How a method is run, not what it computes.
_SILENT = ("cache_file", "covariance_file", "verbose", "prune_temporary_fields")
_BARE = ("gaussian", "olora", "orthogonal", "mica")
CONFIGURED = ("loftq", "eva", "corda", "lora_ga")
_VARIANTS = {
    "velora_config": "velora",
    "kasa_config": "kasa",
    "monteclora_config": "monteclora",
    "use_bdlora": "bdlora",
}


def attributes(config: PeftConfig) -> dict[str, str]:
    """Return each attribute as it is written; but for rank and alpha, only what is no default.

    Raises LoraFxError for inits and settings of methods that the language does not know.
    """
    alpha = config.get("lora_alpha", 8)
    runtime = config.get("runtime_config", {})
    written: dict[str, Value | None] = {
        "rank": config.get("r", 8),
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "scaling": Word("rslora") if config.get("use_rslora") else None,
        "dropout": config.get("lora_dropout") or None,
        "init": _init(config),
        "variant": _variant(config),
        "bias": Word(bias) if (bias := config.get("bias", "none")) != "none" else None,
        "lora_bias": config.get("lora_bias") or None,
        "tie": config.get("ensure_weight_tying") or None,
        "offload": runtime.get("ephemeral_gpu_offload") or None,
    }
    return {name: show(value) for name, value in written.items() if value is not None}


def _init(config: PeftConfig) -> Word | None:
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    if name is True:
        return None
    if name is False:
        return Word("random")
    if name == "pissa" or name in _BARE:
        return Word(name)
    if name.startswith("pissa_niter_") and name.rpartition("_")[2].isdecimal():
        return Word("pissa", (("iterations", int(name.rpartition("_")[2])),))
    method = "corda" if name.startswith("corda") else name
    if method in CONFIGURED:
        return _word(config, f"{method}_config", method, INITS[method])
    message = f"`init_lora_weights = {init!r}` has no counterpart in the language"
    raise LoraFxError((config.diagnostic("peft-unsupported", "init_lora_weights", message),))


def _variant(config: PeftConfig) -> Word | None:
    if config.get("use_dora"):
        return Word("dora")
    tokens = config.get("alora_invocation_tokens")
    if tokens:
        return Word("alora", (("tokens", tuple(tokens)),))
    for key, name in _VARIANTS.items():
        if config.get(key) is not None:
            return _word(config, key, name, VARIANTS[name])
    return None


def _word(config: PeftConfig, key: str, name: str, parameters: Rules) -> Word:
    """Return a method with those of its settings that are not the language's defaults."""
    given = {
        ARGUMENTS.get(name, {}).get(setting, setting): value
        for setting, value in config.get(key, {}).items()
        if setting not in _SILENT and value is not None
    }
    unknown = [
        config.diagnostic(
            "peft-unsupported", key, f"`{setting} = {value!r}` of `{key}` is not known"
        )
        for setting, value in given.items()
        if setting not in parameters
    ]
    if unknown:
        raise LoraFxError(unknown)
    arguments = ((setting, _value(value, parameters[setting])) for setting, value in given.items())
    return Word(name, tuple((s, value) for s, value in arguments if value != parameters[s].default))


def _value(value: Any, rule: Rule) -> Value:
    if isinstance(value, str) and rule.words:
        return Word(value)
    return tuple(value) if isinstance(value, list) else value
