"""transformers records hidden states and attentions by hooks; what of it compiled code can do.

Once asked for, the hooks stay. The one on a layer runs outside the layer's graph. Those inside
read a `ContextVar`, which Dynamo cannot trace: they are put to rest while a unit runs, unless
what they record is wanted, for which the unit runs uncompiled. A model that is composed of others
may ask them for hidden states itself. In a graph of the whole the hooks record as they should, but
it cannot put them in place.

Relies on two private names of transformers, the variable those hooks read and the function that
puts them in place, where it has them; `test_recorded_outputs` holds them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

try:
    from transformers.utils import output_capturing

    _active_collector = output_capturing._active_collector
except ImportError:
    output_capturing = _active_collector = None

_SWITCHES = ("output_hidden_states", "output_attentions", "output_router_logits")


def place_hooks(model: nn.Module) -> None:
    """Put the hooks in place of models that a composed one may ask for hidden states."""
    composed = getattr(getattr(model, "config", None), "sub_configs", None)
    if not composed or output_capturing is None:
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:
            output_capturing.maybe_install_capturing_hooks(module)


def inner_outputs_wanted(whole_model: bool, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call wants outputs that only hooks inside the unit can record."""
    if whole_model:
        return any(kwargs.get(name) for name in _SWITCHES)
    wanted = (_active_collector.get() if _active_collector else None) or {}
    return any(not key.startswith("_") and key != "hidden_states" for key in wanted)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Let the hooks find nothing to record."""
    if _active_collector is None:
        yield
        return
    _active_collector.compiling = True
    try:
        yield
    finally:
        _active_collector.compiling = False
