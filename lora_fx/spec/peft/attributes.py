"""The settings of a PEFT config that are attributes of an adapter."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lora_fx.spec.attributes import INITS, VARIANTS
from lora_fx.spec.expressions import Value, Word, show
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.config_faults import Fault
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
_ITERATIONS = re.compile(r"pissa_niter_([0-9]+)")
CONFIGURED = ("loftq", "eva", "corda", "lora_ga")
_INITS = INITS.keys() - {"default", "random"}  # which PEFT calls true and false
_VARIANTS = {
    "velora_config": "velora",
    "kasa_config": "kasa",
    "monteclora_config": "monteclora",
    "use_bdlora": "bdlora",
}


def attributes(config: PeftConfig) -> dict[str, str]:
    """Return each attribute as it is written; but for rank and alpha, only what is no default."""
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


def attribute_faults(config: PeftConfig) -> Iterator[Fault]:
    """Yield a fault for an init, and for each setting of a method, that is no attribute."""
    init = config.get("init_lora_weights", True)
    name = init_name(config)
    if isinstance(name, str) and not (name in _INITS or _ITERATIONS.fullmatch(name)):
        message = f"`init_lora_weights = {init!r}` has no counterpart in the language"
        yield Fault("init_lora_weights", message)
    for key, method, parameters in _methods(config):
        for setting, value in _settings(config, key, method).items():
            if setting not in parameters:
                yield Fault(key, f"`{setting} = {value!r}` of `{key}` is not known")


def init_name(config: PeftConfig) -> str | bool:
    """Return PEFT's name of the init, in the case that it compares names in."""
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    return "corda" if isinstance(name, str) and name.startswith("corda") else name


def _init(config: PeftConfig) -> Word | None:
    name = init_name(config)
    if isinstance(name, bool):
        return None if name else Word("random")
    iterations = _ITERATIONS.fullmatch(name)
    if iterations:
        return Word("pissa", (("iterations", int(iterations[1])),))
    return _word(config, f"{name}_config", name, INITS[name]) if name in CONFIGURED else Word(name)


def _variant(config: PeftConfig) -> Word | None:
    if config.get("use_dora"):
        return Word("dora")
    tokens = config.get("alora_invocation_tokens")
    if tokens:
        return Word("alora", (("tokens", tuple(tokens)),))
    methods = (method for method in _methods(config) if method[0] in _VARIANTS)
    return next((_word(config, *method) for method in methods), None)


def _methods(config: PeftConfig) -> Iterator[tuple[str, str, Rules]]:
    """Yield the methods that are in use and have settings: their key, name and parameters."""
    name = init_name(config)
    if isinstance(name, str) and name in CONFIGURED:
        yield f"{name}_config", name, INITS[name]
    for key, variant in _VARIANTS.items():
        if config.get(key) is not None:
            yield key, variant, VARIANTS[variant]


def _word(config: PeftConfig, key: str, name: str, parameters: Rules) -> Word:
    """Return a method with those of its settings that are not the language's defaults."""
    given = (
        (setting, _value(value, parameters[setting]))
        for setting, value in _settings(config, key, name).items()
    )
    return Word(name, tuple((s, value) for s, value in given if value != parameters[s].default))


def _settings(config: PeftConfig, key: str, method: str) -> dict[str, Any]:
    """Return the settings of a method by the language's names."""
    ours = ARGUMENTS.get(method, {})
    return {
        ours.get(setting, setting): value
        for setting, value in config.get(key, {}).items()
        if setting not in _SILENT and value is not None
    }


def _value(value: Any, rule: Rule) -> Value:
    if isinstance(value, str) and rule.words:
        return Word(value)
    return tuple(value) if isinstance(value, list) else value
