"""Which of Dynamo's guards a graph is called with: those that say something of their own.

Each call of a graph evaluates them, for each site of each layer; what follows from others is left
out, which also lets torch pass over a module whose dictionaries nobody has written to since.

    a choice of adapters     all but tensors follows from its `form`, which has a guard itself
    scalings                 float32, as many as there are branches, beside these
    the routing              one for all; whether there are shares, the arguments of a unit say
    a method of a site       functions of classes, and their defaults, are not written to
    what a module keeps      parameters, buffers and modules are in dictionaries
"""

import re
from collections.abc import Sequence
from typing import Any

from lora_fx.adapters.sites.site import Site
from lora_fx.runtime.units.layer_index import without_cache_indices

_OF_CHOICE = re.compile(r"^(?P<choice>.*\.lora_(?:mixed|choice))(?:\.(?!.*\.arithmetic\b).*)?$")
_OF_ROUTING = re.compile(r"\.lora_routing\b")
_SCALINGS = re.compile(r"\._buffers\['lora_(?:mixed_)?scalings'\]$")
_KEPT_IN = re.compile(r"\._(?:parameters|buffers|modules)$")
_OF_METHOD = re.compile(r"^dict\(type\(.*\)\.__mro__\[\d+\]\.__dict__\)\['(?P<method>\w+)'\]\.__")
_FORWARD = re.compile(r"^type\(.*\)\.__mro__\[\d+\]\.forward$")


def kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Say of each guard whether it is kept: `guard_filter_fn` of `torch.compile`."""
    names = {guard.name for guard in guards}
    kept = zip(guards, without_cache_indices(guards), strict=True)
    return [keep and not _follows(guard, names) for guard, keep in kept]


def _follows(guard: Any, names: set[str]) -> bool:
    """Return whether a guard holds wherever the others do."""
    if _OF_ROUTING.search(guard.name) or _SCALINGS.search(guard.name):
        return True
    if _is_method(guard):
        return True
    if guard.guard_type == "TYPE_MATCH" and _KEPT_IN.search(guard.name):
        return True
    found = _OF_CHOICE.match(guard.name)
    return (
        found is not None
        and f"{found['choice']}_form" in names
        and guard.guard_type != "TENSOR_MATCH"
    )


def _is_method(guard: Any) -> bool:
    """Return whether a guard is on a site's function, or on that of a layer of torch beneath it."""
    found = _OF_METHOD.match(guard.name)
    if found is not None:
        return found["method"] in vars(Site)
    known = (getattr(guard.value, "__module__", None) or "").startswith(("torch.nn.", "lora_fx."))
    return known and _FORWARD.match(guard.name) is not None
