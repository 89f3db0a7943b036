"""Where to read on after a statement that cannot be read."""

import re
from collections.abc import Sequence
from typing import Any

from lark import Token

_MODEL_STATEMENTS = ("include", "let", "model", "layers", "quantize", "check", "compile")
_ADAPTER_STATEMENTS = ("preset", "adapter", "route", "merge", "optimizer")
STATEMENTS = _MODEL_STATEMENTS + _ADAPTER_STATEMENTS
INNER_STATEMENTS = {
    **dict.fromkeys(("use", "target", "train", "tokens"), "adapter"),
    **dict.fromkeys(("replicate", "drop"), "layers"),
    **{"when": "route", "from": "merge", "entry": "compile"},
}

KEYWORDS = frozenset((*STATEMENTS, *INNER_STATEMENTS))
SCAN = re.compile(r'"(?:\\.|[^"\\\n])*"?|#[^\n]*|[A-Za-z_]\w*|\S')


def statement_start(stack: Sequence[Any], failed_at: int) -> int:
    """Return where the innermost unfinished statement begins, from the parser's value stack."""
    start = failed_at
    for value in reversed(stack):
        if not isinstance(value, Token):
            continue
        if value.type == "LBRACE":
            break
        start = value.start_pos or 0
        if value.type.lower() in KEYWORDS:
            break
    return start


def next_statement(text: str, start: int, failed_at: int) -> int:
    """Return where the first statement at or after `failed_at`, or the end of the block, begins.

    Always beyond `start`. Blocks that open in between are passed over.
    """
    depth = 0
    for found in SCAN.finditer(text, failed_at):
        at = found.start()
        if depth == 0 and at > start and (found[0] == "}" or _begins_statement(text, found)):
            return at
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "}":
            return found.end()
        depth = max(depth, 0)
    return len(text)


def _begins_statement(text: str, found: re.Match[str]) -> bool:
    line_start = text.rfind("\n", 0, found.start()) + 1
    if text[line_start : found.start()].strip(" \t"):
        return False
    return found[0] in KEYWORDS or bool(re.match(r"[A-Za-z_]\w*\s*=(?!=)", text[found.start() :]))
