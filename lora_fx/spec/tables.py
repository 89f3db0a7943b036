"""A grammar's tables in the user's cache folder, so that they are not built at every start.

A file there holds plain JSON after the checksum of it: one that is damaged reads as none, and
nothing in it is ever run. Where the folder cannot be read or written there is no cache, and nothing
else changes.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import lark
from lark import Lark
from lark.grammar import Rule
from lark.lexer import TerminalDef

from lora_fx.spec.user_cache import user_cache
from lora_fx.spec.whole_file import write_whole


def key(grammar: str, options: dict[str, Any]) -> str:
    """Return the name of the tables that this version of Lark makes of a grammar."""
    return sha256(json.dumps([grammar, options, lark.__version__]).encode()).hexdigest()


def read(key: str) -> Lark | None:
    """Return the parser whose tables are kept under a key, or None: there are none, or damaged."""
    try:
        checksum, _, data = _path(key).read_bytes().partition(b"\n")
    except (OSError, RuntimeError):
        return None
    if checksum.decode(errors="replace") != sha256(data).hexdigest():
        return None
    return Lark.load(_with_whole_numbers(json.loads(data)))


def write(key: str, parser: Lark) -> None:
    """Keep a parser's tables under a key; the file appears whole or not at all."""
    data, memo = parser.memo_serialize([TerminalDef, Rule])
    text = json.dumps({"data": data, "memo": memo}, separators=(",", ":")).encode()
    try:
        path = _path(key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, sha256(text).hexdigest().encode() + b"\n" + text)
    except (OSError, RuntimeError):
        return


def _path(key: str) -> Path:
    return user_cache() / f"tables-{key[:16]}.json"


def _with_whole_numbers(tables: dict[str, Any]) -> dict[str, Any]:
    """Make the keys numbers again that were numbers before JSON made them texts."""
    parser = tables["data"]["parser"]["parser"]
    parser["tokens"] = _numbered(parser["tokens"])
    parser["states"] = {k: _numbered(v) for k, v in _numbered(parser["states"]).items()}
    return {"data": tables["data"], "memo": _numbered(tables["memo"])}


def _numbered(table: dict[str, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in table.items()}
