"""Values, names and containers of the data, each checked where it stands."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.expressions import quote, show
from lora_fx.spec.json_form.fragments import Kind, fragment_faults
from lora_fx.spec.one_line import one_line

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 40
_MOST_NESTED = 50


class Values:
    """Turn parts of the data into source text; `faults` is what is wrong with them.

    Each method is given a value and where it stands, as `$.adapters.default.rank`. What is wrong
    has some right text, so that the rest is read too.
    """

    def __init__(self) -> None:
        self.faults: list[Diagnostic] = []

    def fault(self, at: str, wrong: str, *values: Any, help: str | None = None) -> None:
        """Note what is wrong with the data at a place, and the value that stands there."""
        shown = "".join(f"; it is `{_shown(value)}`" for value in values)
        self.faults.append(Diagnostic("wrong-json", f"`{at}` {wrong}{shown}", help=help))

    def value(self, value: Any, at: str, depth: int = 0) -> str:
        """Return a value of an attribute as an expression."""
        if depth > _MOST_NESTED:
            self.fault(at, "is nested too deeply")
            return "0"
        match value:
            case bool():
                return show(value)
            case int() | float() if isfinite(value):
                return repr(value)
            case str():
                return self.fragment("expression", value, at)
            case list() | tuple():
                parts = (self.value(v, f"{at}[{i}]", depth + 1) for i, v in enumerate(value))
                return f"[{', '.join(parts)}]"
            case {"text": text, **others} if not others:
                return self.quoted(text, f"{at}.text")
            case _:
                message = (
                    "must be a number, true or false, a string that is an expression, "
                    '`{"text": "…"}` or a list of these'
                )
                self.fault(at, message, value)
                return "0"

    def fragment(self, kind: Kind, value: Any, at: str) -> str:
        """Return a string that is a part of the language."""
        if not isinstance(value, str):
            self.fault(at, f"must be a string that is one {kind}", value)
            return "x"
        self.faults += fragment_faults(kind, value, at)
        return one_line(value)

    def quoted(self, value: Any, at: str) -> str:
        """Return a string as a text in quotes."""
        if not isinstance(value, str) or re.search(r"[\n\r]", value):
            self.fault(at, "must be a string without line breaks", value)
            return '"x"'
        return quote(value)

    def name(self, value: Any, at: str) -> str:
        """Return a string that is a name of the language."""
        if isinstance(value, str) and _NAME.fullmatch(value):
            return value
        self.fault(at, "must be a name: letters, digits and `_`", value)
        return "x"

    def title(self, value: Any, at: str) -> str:
        """Return the name of an adapter, in quotes if it is no name of the language."""
        plain = isinstance(value, str) and _NAME.fullmatch(value)
        return value if plain else self.quoted(value, at)

    def mapping(
        self, value: Any, at: str, known: Iterable[str], needs: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Return the known keys of a mapping with their values."""
        if not isinstance(value, Mapping):
            self.fault(at, "must be a mapping", value)
            return {}
        known = tuple(known)
        for key in value:
            if key not in known:
                self.fault(at, f"has no `{key}`", help=did_you_mean(str(key), known))
        for key in needs:
            if key not in value:
                self.fault(at, f"needs `{key}`")
        return {key: v for key, v in value.items() if key in known}

    def entries(self, value: Any, at: str) -> Iterator[tuple[str, Any, str]]:
        """Yield keys, values and places of a mapping whose keys are names that the user chose."""
        if not isinstance(value, Mapping):
            self.fault(at, "must be a mapping", value)
            return
        for key, inner in value.items():
            plain = isinstance(key, str) and _NAME.fullmatch(key)
            yield key, inner, f"{at}.{key}" if plain else f"{at}[{_shown(key)}]"

    def items(self, value: Any, at: str) -> Iterator[tuple[Any, str]]:
        """Yield the items of a list and their places."""
        if not isinstance(value, list | tuple):
            self.fault(at, "must be a list", value)
            return
        for i, inner in enumerate(value):
            yield inner, f"{at}[{i}]"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
