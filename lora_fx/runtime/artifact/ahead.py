"""Graphs that are compiled ahead, with their guards, to be called in another process.

Relies on torch's experimental `aot_compile` of a compiled function, its `guard_check`,
`disable_guard_check`, `source_info` and `save_compiled_function`, and on
`torch.compiler.load_compiled_function`, and on the list of guards that cannot be written down;
`tests/runtime/artifact/test_ahead.py` holds what is used of them.
"""

import importlib
import inspect
import io
import logging
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.guards import CheckFunctionManager
from torch._ops import OpOverload

from lora_fx.runtime.units import unit
from lora_fx.runtime.units.layer_index import without_cache_indices

_UNWRITABLE = frozenset(CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)
_CODE = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType),
    *(types.ModuleType, OpOverload),
)
_log = logging.getLogger(__name__)


class AheadFunction:
    """One compiled graph of a unit, called as the unit is: with a module, args and kwargs."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        compiled.disable_guard_check()  # whoever calls it has asked `matches`

    def matches(self, *call: Any) -> bool:
        """Whether the graph is of this call: every guard holds."""
        return self._compiled.guard_check(*call)

    def __call__(self, *call: Any) -> Any:
        """Run the graph; `matches` must be true of this call."""
        return self._compiled(*call)

    def sources_unchanged(self) -> bool:
        """Whether every Python file that the graph was traced through reads as it did then."""
        sources = {source.module: source for source in self._compiled.source_info().inlined_sources}
        return all(_text_of(name) == source.content for name, source in sources.items())

    def save(self, path: Path) -> None:
        """Write the graph to a file. Raises whatever pickling raises."""
        self._compiled.save_compiled_function(str(path))


def writable(guards: Sequence[Any]) -> list[bool]:
    """Say of each guard whether it is kept: `guard_filter_fn` of `torch.compile`.

    Left out are those on global variables, and those on the identity of code: classes, functions,
    modules. `key` and `sources_unchanged` stand in for them.
    """
    kept = without_cache_indices(guards)
    return [k and not (g.is_global or _is_of_code(g)) for k, g in zip(kept, guards, strict=True)]


def _is_of_code(guard: Any) -> bool:
    unwritable = not _UNWRITABLE.isdisjoint((guard.guard_type, *guard.derived_guard_types))
    return unwritable and isinstance(guard.value, _CODE)


def compile_ahead(entry: Any, call: tuple[Any, ...]) -> AheadFunction | None:
    """Compile the graph of a call of a `torch.compile` entry; None where torch cannot do that.

    Such are graphs with guards on what only this process has. `writable` is the entry's filter.
    """
    try:
        with warnings.catch_warnings():  # it looks at the gradients of inputs that have none
            warnings.filterwarnings("ignore", "The .grad attribute", UserWarning)
            return AheadFunction(entry.aot_compile((call, {})))
    except Exception as error:  # whatever it is, compiling as always says it better
        _log.info("not compiled ahead: %s: %s", type(error).__name__, error)
        return None


def load_ahead(data: bytes) -> AheadFunction | None:
    """Return a compiled graph that was written, or None if it is not of this process's code.

    The data is unpickled: it must be trusted.
    """
    try:
        file, names = io.BytesIO(data), dict(vars(unit))
        function = AheadFunction(torch.compiler.load_compiled_function(file, f_globals=names))
    except Exception as error:
        _log.info("not used: %s: %s", type(error).__name__, error, exc_info=True)
        return None
    return function if function.sources_unchanged() else None


def _text_of(module: str) -> str | None:
    try:
        return inspect.getsource(importlib.import_module(module))
    except (ImportError, OSError, TypeError):
        return None
