"""The grammar, ready to parse with: `grammar/lora.lark`, whose tables are built once a machine."""

from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark

from lora_fx.spec import tables

_OPTIONS: dict[str, Any] = {
    "parser": "lalr",
    "propagate_positions": True,
    "maybe_placeholders": False,
}


@cache
def grammar() -> Lark:
    """Return the parser of the language."""
    text = _file().read_text(encoding="utf-8")
    key = tables.key(text, _OPTIONS)
    parser = tables.read(key)
    if parser is None:
        parser = Lark(text, **_OPTIONS)
        tables.write(key, parser)
    return parser


def _file() -> Path:
    beside = Path(__file__).parent.parent / "lora.lark"
    checkout = Path(__file__).parent.parent.parent / "grammar" / "lora.lark"
    return beside if beside.exists() else checkout
