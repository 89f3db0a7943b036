"""Read a PEFT config as given: a dict, a `LoraConfig`, a file, or a folder that holds one."""

import json
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.config_faults import Fault, malformed
from lora_fx.spec.peft.unsupported import unsupported

CONFIG = "adapter_config.json"


def read_config(config: Any) -> PeftConfig:
    """Read a PEFT config: a dict, a `LoraConfig`, an `adapter_config.json` or its folder.

    Raises LoraFxError with every setting whose value cannot be used, else with every one that the
    language cannot say.
    """
    if isinstance(config, str | Path):
        given = _read_file(Path(config))
    elif isinstance(config, Mapping):
        given = PeftConfig(_plain(dict(config)))
    else:
        given = PeftConfig(_plain(_of_object(config)))
    _raise("adapter-config", malformed(given.values), given)
    _raise("peft-unsupported", unsupported(given), given)
    return given


def _raise(code: str, faults: Iterable[Fault], config: PeftConfig) -> None:
    found = [config.diagnostic(code, fault.key, fault.message) for fault in faults]
    if found:
        raise LoraFxError(sorted(found, key=lambda d: d.span.start if d.span else 0))


def _read_file(path: Path) -> PeftConfig:
    path = path / CONFIG if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        message = f"`{path}` cannot be read: {error}"
        raise LoraFxError((Diagnostic("adapter-unreadable", message),)) from error
    if not isinstance(values, dict):
        message = f"`{path}` cannot be read: not a JSON object"
        raise LoraFxError((Diagnostic("adapter-unreadable", message),))
    return PeftConfig(values, Source(str(path), text))


def _of_object(config: Any) -> dict[str, Any]:
    """Take a `LoraConfig` apart; its `to_dict` leaves out what PEFT does not save."""
    if not hasattr(config, "to_dict"):
        message = f"a `{type(config).__name__}` is no PEFT config"
        help = "give a dict, a LoraConfig, an adapter_config.json or its folder"
        raise LoraFxError((Diagnostic("adapter-unreadable", message, help=help),))
    runtime = getattr(config, "runtime_config", None)
    return config.to_dict() | ({"runtime_config": vars(runtime)} if runtime else {})


def _plain(value: Any) -> Any:
    """Return a value as JSON would: sets as sorted lists, enums as their texts."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.value if isinstance(value, Enum) else value
