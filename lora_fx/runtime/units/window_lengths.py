"""Let a whole model's graph know on which side of an attention window its lengths are.

Within its window, sliding attention is plain causal attention. Where lengths are symbols, a graph
would have to serve both sides; with a comparison in the traced code it is of one.
"""

from typing import Any

from torch import Tensor, nn


def windows_of(module: nn.Module) -> tuple[int, ...]:
    """Return the attention windows that a model's config names, its parts' configs too."""
    config = getattr(module, "config", None)
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    found = {getattr(part, "sliding_window", None) for part in parts}
    return tuple(sorted(window for window in found if isinstance(window, int)))


def compare(windows: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the windows that hold all tokens of a call. Dynamo guards on every comparison."""
    given = [*args[:1], *(kwargs.get(name) for name in _TOKENS)]
    lengths = [v.shape[1] for v in given if isinstance(v, Tensor) and v.ndim > 1]
    return [window for window in windows for length in lengths if length <= window]


_TOKENS = ("input_ids", "inputs_embeds", "decoder_input_ids")
