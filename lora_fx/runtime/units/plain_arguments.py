"""Tell a whole model's graph which of its arguments say nothing: masks of ones, plain positions.

transformers looks at the values of a mask to learn that attention needs none. A graph cannot look,
so it is done before the graph runs, once a call, which waits for the device. What was seen is a
constant to the graph: a model has one for padded samples and one for others. In the graph a plain
argument is made anew, equal in every element, so whatever the model does with it stays the same,
and `passes/causal_attention.py` can read off what it is.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NOTE = "lora_fx_plain"
_POSITIONS = "position_ids"
Place = int | str  # an argument's number, or its name


def note_plain(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments with a note of which of all arguments are plain.

    `forward` is the method that they are for. Positions decide a mask only if no mask is given.
    """
    names = _parameters(forward.__func__)[1 : len(args) + 1]
    given = {name: (place, args[place]) for place, name in enumerate(names)}
    given |= {name: (name, value) for name, value in kwargs.items()}
    masks = [n for n, (_, v) in given.items() if n.endswith("attention_mask") and v is not None]
    asked = {name: given[name] for name in masks or [_POSITIONS] if name in given}
    plain = tuple(
        (place, name == _POSITIONS)
        for name, (place, value) in asked.items()
        if _can_be_read(value) and bool((value == _plain(value, name == _POSITIONS)).all())
    )
    return {**kwargs, NOTE: plain} if plain else kwargs


def with_plain(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, the noted ones made anew. This is traced into the graph."""
    if NOTE not in kwargs:
        return args, kwargs
    note, listed = kwargs[NOTE], list(args)
    kwargs = {name: value for name, value in kwargs.items() if name != NOTE}
    for place, is_positions in note:
        if isinstance(place, int):
            listed[place] = _plain(listed[place], is_positions)
        else:
            kwargs[place] = _plain(kwargs[place], is_positions)
    return tuple(listed), kwargs


def _plain(like: Tensor, is_positions: bool) -> Tensor:
    """Return 0, 1, 2, … along the last dimension, or ones; as large, of the same dtype."""
    if not is_positions:
        return torch.ones_like(like, memory_format=torch.contiguous_format)
    order = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
    return order.expand(like.shape).contiguous()


def _can_be_read(value: Any) -> bool:
    """Whether it is a mask of samples, or positions, with values that may be waited for."""
    if type(value) is not Tensor or value.is_meta or value.ndim not in (1, 2):
        return False
    if value.is_floating_point() or value.is_complex():
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


@lru_cache
def _parameters(forward: Any) -> list[str]:
    return list(inspect.signature(forward).parameters)
