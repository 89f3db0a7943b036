"""Hand a layer its own slice of the key/value cache, so that its index guards nothing.

With the whole cache in hand, `cache.update(k, v, self.layer_idx)` reads `layers[layer_idx]`, and
Dynamo must guard on the index: every layer becomes a graph of its own. A view of one layer, made
outside the compiled call, leaves nothing to tell layers apart.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers.cache_utils import Cache, EncoderDecoderCache

INDEX = "layer_idx"
METHODS = frozenset(
    name
    for name, method in inspect.getmembers(Cache, inspect.isfunction)
    if INDEX in inspect.signature(method).parameters
)


class _Only:
    """One layer under every index."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter((self.layer,))

    def __getitem__(self, index: int) -> Any:
        return self.layer


class _Flag:
    """One value under every key."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def get(self, key: int) -> bool:
        return self.value

    def __getitem__(self, key: int) -> bool:
        return self.value

    def __setitem__(self, key: int, value: bool) -> None:
        self.value = value


class LayerCache(Cache):
    """One layer of a cache under the whole cache's interface; indices are ignored."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layers=_Only(layer))  # type: ignore[arg-type]

    def write_back(self) -> None:
        """Do nothing: the layer is the whole cache's own."""


def _at_zero(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method for the layer at 0, whichever index it is called with."""
    place = list(inspect.signature(method).parameters).index(INDEX) - 1

    def at_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            args = (*args[:place], 0, *args[place + 1 :])
        else:
            kwargs[INDEX] = 0
        return method(self, *args, **kwargs)

    return at_zero


for _name in METHODS:
    setattr(LayerCache, _name, _at_zero(getattr(Cache, _name)))


class LayerCaches(EncoderDecoderCache):
    """One layer of a decoder's own cache and of its cache of what the encoder said."""

    def __init__(self, cache: EncoderDecoderCache, index: int) -> None:
        self.self_attention_cache = view(cache.self_attention_cache, index)
        self.cross_attention_cache = view(cache.cross_attention_cache, index)
        self.is_updated = _Flag(cache.is_updated.get(index, False))  # type: ignore[assignment]
        self._written = cache.is_updated, index

    def write_back(self) -> None:
        """Tell the whole cache whether the layer has read the encoder's output."""
        flags, index = self._written
        flags[index] = self.is_updated.get(index)  # type: ignore[assignment]


def view(cache: Cache, index: int) -> LayerCache | LayerCaches:
    """Return layer `index` of `cache` as a cache of its own; shares the layer's tensors.

    Call `write_back` when the layer has run.
    """
    if isinstance(cache, EncoderDecoderCache):
        return LayerCaches(cache, index)
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return LayerCache(cache.layers[index])


def with_views(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int
) -> tuple[tuple[Any, ...], dict[str, Any], list[LayerCache | LayerCaches]]:
    """Return arguments with views of layer `index` in the place of caches, and these views."""
    views: list[LayerCache | LayerCaches] = []

    def seen(value: Any) -> Any:
        if not isinstance(value, Cache):
            return value
        views.append(view(value, index))
        return views[-1]

    return tuple(map(seen, args)), {name: seen(v) for name, v in kwargs.items()}, views
