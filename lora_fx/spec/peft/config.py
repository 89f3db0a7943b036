"""A PEFT config, and where each of its settings stands in its file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_fx.diagnostics import Diagnostic, Source, Span


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
