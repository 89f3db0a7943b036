"""What is wrong, where, and what to do about it: as data, as text, as JSON and as SARIF.

Ways of showing it are loaded when they are first used: a file without a mistake needs none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_fx.diagnostics.diagnostic import Diagnostic as Diagnostic
from lora_fx.diagnostics.diagnostic import LoraFxError as LoraFxError
from lora_fx.diagnostics.diagnostic import Severity as Severity
from lora_fx.diagnostics.source import Source as Source
from lora_fx.diagnostics.source import Span as Span

if TYPE_CHECKING:
    from lora_fx.diagnostics.as_json import to_json as to_json
    from lora_fx.diagnostics.sarif import to_sarif as to_sarif
    from lora_fx.diagnostics.text import render as render
    from lora_fx.diagnostics.text import to_rich as to_rich

_HOMES = {"render": "text", "to_rich": "text", "to_json": "as_json", "to_sarif": "sarif"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
