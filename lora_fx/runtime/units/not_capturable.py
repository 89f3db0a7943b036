"""What torch says of a forward that it cannot capture, as a diagnostic at the model's own line."""

import re
from typing import Any

from torch import nn

from lora_fx.adapters.sites.adapted_weight import UNROUTED, UNSUPPORTED, unsupported_use
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.units.model_source import innermost, span_of

_DETAIL = re.compile(
    r"^ *(?:Explanation: |Developer debug context: (?=raised exception))(.+)$", re.MULTILINE
)
_UNSUPPORTED = re.compile(
    "|".join(re.escape(text).replace(r"\{\}", "[^`]+") for text in (UNSUPPORTED, UNROUTED))
)


def not_capturable(module: nn.Module, error: Any) -> LoraFxError:
    """Return the error that names module, reason and place; `error` is Dynamo's."""
    reason, *_ = str(error).strip().splitlines()
    stack = getattr(error, "real_stack", None) or ()
    place = span_of(innermost((frame.filename, frame.lineno or 0) for frame in stack))
    unsupported = _UNSUPPORTED.search(str(error))
    if unsupported is not None:
        return unsupported_use(unsupported[0], place)
    message = f"the forward of `{type(module).__name__}` cannot be captured as one graph"
    notes = tuple(dict.fromkeys(_DETAIL.findall(str(error))))
    help = "compile with `backend=None`, which runs the same adapters uncompiled"
    label = reason if place is not None else ""
    shown = notes if place is not None else (reason, *notes)
    fault = Diagnostic("not-capturable", message, place, label, notes=shown, help=help)
    return LoraFxError((fault,))
