"""Hand a layer its own slice of the key/value cache, so that its index guards nothing.

With the whole cache in hand, `cache.update(k, v, self.layer_idx)` reads `layers[layer_idx]`, and
Dynamo must guard on the index: every layer becomes a graph of its own. A view of one layer, made
outside the compiled call, leaves nothing to tell layers apart.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class LayerCache(Cache):
    """One layer of a cache under the whole cache's interface; indices are ignored."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layers=[layer])
        self._layer = layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Extend this layer's keys and values and return them whole."""
        return self._layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached positions of this layer."""
        return self._layer.get_seq_length()


def view(cache: Cache, index: int) -> Cache:
    """Return layer `index` of `cache` as a cache of its own; shares the layer's tensors."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return LayerCache(cache.layers[index])
