"""A PEFT config as given: a dict, a `LoraConfig`, a file, or a folder that holds one."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
from lora_fx.spec.peft.config_faults import malformed
from lora_fx.spec.peft.unsupported import unsupported

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a config, all of them usable; `source` is its file, if it came from one."""

    values: Mapping[str, Any]
    source: Source | None = None

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Return a setting, or `otherwise` if it is missing or null."""
        value = self.values.get(key)
        return otherwise if value is None else value

    @property
    def names_targets(self) -> bool:
        """Whether it says itself which modules are adapted, whatever the model."""
        return self.get("target_modules") is not None

    @property
    def asks_for_its_model(self) -> bool:
        """Whether the model decides which modules are adapted, and the config says which it is."""
        return not self.names_targets and bool(self.get("base_model_name_or_path"))

    def diagnostic(
        self, code: str, key: str, message: str, *notes: str, help: str | None = None
    ) -> Diagnostic:
        """Return a diagnostic at a setting: at its place in the file, if there is one."""
        span = self.source and _span(self.source, key)
        return Diagnostic(code, message, span, notes=notes, help=help)


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
    for code, faults in (
        ("adapter-config", malformed(given.values)),
        ("peft-unsupported", unsupported(given.values)),
    ):
        found = [given.diagnostic(code, fault.key, fault.message) for fault in faults]
        if found:
            raise LoraFxError(sorted(found, key=lambda d: d.span.start if d.span else 0))
    return given


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


def _span(source: Source, key: str) -> Span | None:
    """Find a setting of the outermost object in its JSON text."""
    for found in re.finditer(rf"{re.escape(json.dumps(key))}\s*:\s*", source.text):
        _, end = json.JSONDecoder().raw_decode(source.text, found.end())
        if _depth(source.text[: found.start()]) == 1:
            return Span(source, found.start(), min(end, _line_end(source.text, found.end())))
    return None


def _depth(text: str) -> int:
    bare = re.sub(r'"(\\.|[^"\\])*"', "", text)
    return bare.count("{") - bare.count("}")


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end
