"""An error inside brackets: reading goes on behind them."""

from collections.abc import Iterator

from lark import Token

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.correction import Correction, Failure
from lora_fx.spec.patched import Patched
from lora_fx.spec.recovery import SCAN

_CLOSING = {"LPAR": ")", "LSQB": "]"}
_DEPTH = {"(": 1, "[": 1, ")": -1, "]": -1}


def skip_to_closing(
    failure: Failure, patched: Patched, diagnostic: Diagnostic
) -> Iterator[Correction]:
    """Yield corrections that leave out the rest of what stands in the innermost open bracket."""
    end = closing(failure, patched)
    if end is None:
        return
    bracket = patched.text[end]
    for filler in ("", "0") if bracket == "]" else ("",):
        yield Correction(diagnostic, failure.start, end + 1, f" {filler}{bracket}", whole=False)


def closing(failure: Failure, patched: Patched) -> int | None:
    """Return where the innermost open bracket is closed, behind the failure in its statement."""
    opened = (v.type for v in reversed(failure.stack) if isinstance(v, Token))
    bracket = next((_CLOSING.get(t) for t in opened if t in _CLOSING or t == "LBRACE"), None)
    if bracket is None:
        return None
    depth = 0
    for found in SCAN.finditer(patched.text, failure.start):
        if found[0] in "{}" or (depth == 0 and found[0] in _CLOSING.values()):
            return found.start() if found[0] == bracket else None
        depth += _DEPTH.get(found[0], 0)
    return None
