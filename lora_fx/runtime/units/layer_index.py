"""Let one graph serve layers that differ in `layer_idx` alone.

Cross attention reads `cache.layers[self.layer_idx]` itself. A view of one layer has the same under
every index, so nothing depends on the number; Dynamo guards on it all the same. Such a guard is
left out where the class of the module uses its index for nothing but the cache, and was given views
of one layer alone: which layer of a whole cache it reads does depend on the number.
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from lora_fx.adapters.dynamic_class import base_of
from lora_fx.runtime.units.cache_view import INDEX, METHODS, LayerCache, LayerCaches

_OF_CACHES = METHODS | {"get"}


def without_cache_indices(guards: Sequence[Any]) -> list[bool]:
    """Say of each guard whether it is kept: `guard_filter_fn` of `torch.compile`."""
    values = {guard.name: guard.value for guard in guards if guard.has_value}
    caches = [value for value in values.values() if isinstance(value, Cache)]
    if not caches or not all(isinstance(cache, LayerCache | LayerCaches) for cache in caches):
        return [True for _ in guards]
    return [not _is_cache_index(guard.name, values) for guard in guards]


def _is_cache_index(name: str, values: dict[str, Any]) -> bool:
    owner = values.get(name.removesuffix(f".{INDEX}"))
    if not name.endswith(f".{INDEX}") or not isinstance(owner, nn.Module):
        return False
    return _indexes_caches_only(base_of(type(owner)))


@cache
def _indexes_caches_only(cls: type) -> bool:
    """Whether every use of `self.layer_idx`, in all methods but the constructor, is for a cache."""
    methods = (f for name, f in inspect.getmembers(cls, inspect.isfunction) if name in vars(cls))
    try:
        sources = [inspect.getsource(f) for f in methods if f.__name__ != "__init__"]
    except (OSError, TypeError):
        return False
    trees = [ast.parse(textwrap.dedent(source)) for source in sources]
    used = [n for tree in trees for n in ast.walk(tree) if _is_index(n)]
    indexing = [n for tree in trees for node in ast.walk(tree) for n in _indices(node)]
    return len(used) == len(indexing)


def _is_index(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == INDEX


def _indices(node: ast.AST) -> list[ast.AST]:
    """Return the uses of the index as that of a cache that a node is."""
    match node:
        case ast.Subscript(value=ast.Attribute(attr="layers" | "is_updated"), slice=index):
            return [index] if _is_index(index) else []
        case ast.Call(func=ast.Attribute(attr=method)) if method in _OF_CACHES:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            return [value for value in given if _is_index(value)]
        case _:
            return []
