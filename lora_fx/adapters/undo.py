"""Put a module tree back as it was if something done to it fails."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.plan.offloaded import offload_hook

Container = dict[Any, Any] | list[Any] | set[Any]
_CONTAINERS = frozenset((dict, OrderedDict, list, set))  # looked up: a model has many
_ATOMS = frozenset((bool, int, float, str, tuple, type(None)))


@contextmanager
def undone_on_error(model: nn.Module, changed: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let the block change the tree, and change everything back if it raises anything.

    That is: modules, their classes and attributes, which tensors they have and whether these are
    trained, the hooks that offload them, how a mixed batch is routed, and the model's config.
    Values only of `changed`.
    """
    modules = list(model.modules())
    hooks = [hook for module in modules if (hook := offload_hook(module)) is not None]
    routing = [found for found in (vars(model).get("lora_fx_routing"),) if found is not None]
    objects = [(one, type(one), dict(vars(one))) for one in (*modules, *hooks, *routing)]
    containers = list(_containers(found for _, _, found in objects))
    empty = [one for one in containers if not one]  # most of them, in a module
    contents = [(one, _content(one)) for one in containers if one]
    flags = [(tensor, tensor.requires_grad) for tensor in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in changed]
    try:
        yield
    except BaseException:
        for one, cls, attributes in objects:
            one.__class__ = cls
            _set(vars(one), attributes)
        for container in empty:
            container.clear()
        for container, content in contents:
            _set(container, content)
        for tensor, requires_grad in flags:
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _containers(attributes: Iterable[MutableMapping[str, Any]]) -> Iterator[Container]:
    """Yield each plain container that an attribute is, and the attributes of each config."""
    seen: set[int] = set()
    for some in attributes:
        for value in some.values():
            kind = type(value)
            if kind in _CONTAINERS:
                yield value
            elif kind not in _ATOMS and id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, dict | list | set):
                    yield value
                elif hasattr(value, "to_dict") and hasattr(value, "__dict__"):
                    yield from _containers([vars(value)])
                    yield vars(value)


def _content(container: Container) -> dict[Any, Any] | tuple[Any, ...]:
    """Return what `_set` puts back."""
    return dict(container) if isinstance(container, dict) else tuple(container)


def _set(container: Any, content: Any) -> None:
    """Give a container the content of another, in its order."""
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
