"""A hash of the Python code that a model runs, as it is in this process.

Versions do not tell of a model's own classes, of remote code, and of functions that another
package has put in the place of a model's (fused kernels do so). Of those of torch they do.
"""

import types
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_fx.adapters.dynamic_class import base_of

_KNOWN_BY_VERSION = ("torch", "builtins", "typing", "collections", "functools", "lora_fx")
_PLAIN = (bool, int, float, str, bytes, type(None))


def model_code(model: nn.Module) -> str:
    """Return the hash: of the methods of every module's classes, and of all that they name."""
    found: dict[str, str] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            for function in _functions(value):
                _visit(function, f"{type(module).__qualname__}.{name} of one", found)
    for cls in sorted({base_of(type(module)) for module in model.modules()}, key=str):
        for owner in cls.__mro__:
            if issubclass(owner, nn.Module) and owner not in (nn.Module, PreTrainedModel):
                _visit_class(owner, found)
    return sha256(repr(sorted(found.items())).encode()).hexdigest()


def _visit_class(cls: type, found: dict[str, str]) -> None:
    if not _is_known(cls.__module__):
        for name, value in vars(cls).items():
            for function in _functions(value):
                _visit(function, f"{cls.__module__}.{cls.__qualname__}.{name}", found)


def _visit(function: types.FunctionType, name: str, found: dict[str, str]) -> None:
    """Note the code of a function, the constants and functions that it names or is closed over."""
    if found.get(name) is not None:
        return
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    words = sorted(set(_words(function.__code__)) & function.__globals__.keys())
    named = [function.__globals__[word] for word in words]
    values = (*(function.__defaults__ or ()), *cells, *named)
    plain = [value for value in values if isinstance(value, _PLAIN)]
    found[name] = sha256(repr((_shown(function.__code__), plain)).encode()).hexdigest()
    for value in (*cells, *named):
        for other in _functions(value):
            if not _is_known(other.__module__):
                _visit(other, f"{other.__module__}.{other.__qualname__}", found)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the Python functions that a value is, or is made of."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, types.MethodType | staticmethod | classmethod):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        yield from _functions(value.fget)


def _shown(constant: Any) -> Any:
    """Return what there is of a constant of code, without files and lines."""
    if isinstance(constant, types.CodeType):
        return constant.co_code, constant.co_names, [_shown(c) for c in constant.co_consts]
    if isinstance(constant, frozenset):
        return sorted(map(repr, constant))
    return repr(constant)


def _words(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_known(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _KNOWN_BY_VERSION
