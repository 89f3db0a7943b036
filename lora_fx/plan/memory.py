"""Count parameters and bytes from shapes."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.plan.sites import SitePlan

_ADAMW_STATE = 2


@dataclass(frozen=True)
class Memory:
    """Bytes: AdamW keeps two moments of each trainable parameter in the parameter's dtype."""

    base: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum; activations come on top."""
        return self.base + self.adapters + self.gradients + self.optimizer


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; packed 4-bit weights count what they stand for."""
    state: Any = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _tensors(tree: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and the scales of packed 4-bit weights; some more than once."""
    yield from tree.buffers()
    for parameter in tree.parameters():
        yield parameter
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            yield state.absmax
            state = getattr(state, "state2", None)


def estimate(tree: nn.Module, sites: Iterable[SitePlan]) -> Memory:
    """Return the bytes that training needs beside its activations."""
    base = sum(t.nbytes for t in {id(t): t for t in _tensors(tree)}.values())
    adapters = trainable = 0
    for site in sites:
        size = site.parameters * getattr(torch, site.dtype).itemsize
        adapters += size
        trainable += size * site.trainable
    return Memory(base, adapters, trainable, _ADAMW_STATE * trainable)
