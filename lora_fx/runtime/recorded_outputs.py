"""transformers records hidden states and attentions by hooks; what of it compiled code can do.

Once asked for, the hooks stay. The one on a layer runs outside the layer's graph. Those inside
read a `ContextVar`, which Dynamo cannot trace: they are put to rest while a unit runs, unless
what they record is wanted, for which the unit runs uncompiled.

Relies on one private name of transformers, the variable those hooks read, where it has it;
`test_recorded_outputs` holds it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None

_SWITCHES = ("output_hidden_states", "output_attentions", "output_router_logits")


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
