"""`model.config.*` in expressions."""

from collections.abc import Mapping
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.closest import closest
from lora_fx.spec.expressions import Reference, Value


def config_value(reference: Reference, config: Any) -> Value:
    """Return the value at a path into the model's config, through nested ones and dicts.

    Raises LoraFxError if there is none, or it is no number, text or truth value.
    """
    value = config
    for part in reference.parts[2:]:
        entries = value if isinstance(value, Mapping) else _entries(value)
        if part not in entries:
            word = closest(part, [str(name) for name in entries])
            help = f"did you mean `{word}`?" if word else None
            message = f"the model's config has no `{part}`" if config else "the model has no config"
            raise LoraFxError((Diagnostic("no-config", message, reference.span, help=help),))
        value = entries[part]
    if isinstance(value, bool | int | float | str):
        return value
    message = f"`{reference}` is no number, text or truth value"
    label = f"is a {type(value).__name__}"
    raise LoraFxError((Diagnostic("wrong-type", message, reference.span, label),))


def _entries(config: Any) -> dict[str, Any]:
    """Return the settings of a config object, under all their names."""
    if not hasattr(config, "__dict__"):
        return {}
    others = {name: getattr(config, name, None) for name in getattr(config, "attribute_map", {})}
    return others | {k: v for k, v in vars(config).items() if not k.startswith("_")}
