"""Inits and variants as the settings of a PEFT config that ask for them."""

from typing import Any

from lora_fx.spec.attributes import INITS, VARIANTS
from lora_fx.spec.expressions import Value, Word
from lora_fx.spec.peft.attributes import ARGUMENTS, CONFIGURED
from lora_fx.spec.rule import Rule, completed

_CONFIGS = {"velora": "velora_config", "kasa": "kasa_config", "monteclora": "monteclora_config"}


def init_settings(init: Word) -> dict[str, Any]:
    """Return the settings of an init, with its method's own config."""
    name = init.name
    if name in ("default", "random"):
        return {"init_lora_weights": name == "default"}
    if name == "pissa" and init.arguments:
        return {"init_lora_weights": f"pissa_niter_{init.arguments[0][1]}"}
    if name not in CONFIGURED:
        return {"init_lora_weights": name}
    return {"init_lora_weights": name, f"{name}_config": _config(init, INITS)}


def has_bias(init: Word) -> bool:
    """Whether PEFT lets B have a bias with an init."""
    return init.name in ("default", "random")


def variant_settings(variant: Word) -> dict[str, Any]:
    """Return the settings of a variant."""
    match variant.name:
        case "lora":
            return {}
        case "dora":
            return {"use_dora": True}
        case "alora":
            return {"alora_invocation_tokens": list(variant.argument("tokens"))}  # type: ignore[arg-type]
        case "bdlora":
            return {"use_bdlora": _config(variant, VARIANTS)}
        case name:
            return {_CONFIGS[name]: _config(variant, VARIANTS)}


def _config(word: Word, table: Any) -> dict[str, Any]:
    whole = completed(Rule("", None, words=table), word)
    assert isinstance(whole, Word)
    theirs = {ours: name for name, ours in ARGUMENTS.get(word.name, {}).items()}
    return {theirs.get(name, name): _plain(value) for name, value in whole.arguments}


def _plain(value: Value) -> Any:
    if isinstance(value, Word):
        return value.name
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
