"""Which of Dynamo's guards a graph is called with: those that say something of their own.

Each call of a graph evaluates them, for each site of each layer; what follows from others is left
out:

    a choice of adapters     all but tensors follows from its `form`, which has a guard itself
    scalings                 float32, as many as there are branches, beside these
    the routing              one for all; whether there are shares, the arguments of a unit say
    what a module keeps      parameters, buffers and modules are in dictionaries
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_fx.runtime.units.layer_index import without_cache_indices

_OF_CHOICE = re.compile(r"^(?P<choice>.*\.lora_(?:mixed|choice))(?:\.(?!.*\.arithmetic\b).*)?$")
_OF_ROUTING = re.compile(r"\.lora_routing\b")
_SCALINGS = re.compile(r"\._buffers\['lora_(?:mixed_)?scalings'\]$")
_KEPT_IN = re.compile(r"\._(?:parameters|buffers|modules)$")


def kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Say of each guard whether it is kept: `guard_filter_fn` of `torch.compile`."""
    values = {guard.name: guard.value for guard in guards}
    kept = zip(guards, without_cache_indices(guards), strict=True)
    return [keep and not _follows(guard, values) for guard, keep in kept]


def _follows(guard: Any, values: Mapping[str, Any]) -> bool:
    """Return whether a guard holds wherever the others do."""
    if _OF_ROUTING.search(guard.name) or _SCALINGS.search(guard.name):
        return True
    if guard.guard_type == "TYPE_MATCH" and type(guard.value) is dict:
        return isinstance(values.get(_KEPT_IN.sub("", guard.name)), nn.Module)
    found = _OF_CHOICE.match(guard.name)
    return (
        found is not None
        and f"{found['choice']}_form" in values
        and guard.guard_type != "TENSOR_MATCH"
    )
