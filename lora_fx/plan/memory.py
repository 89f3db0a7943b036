"""Count parameters and bytes from shapes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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


def estimate(tree: nn.Module, sites: Iterable[SitePlan]) -> Memory:
    """Return the bytes that training needs beside its activations."""
    tensors = {id(t): t for t in (*tree.parameters(), *tree.buffers())}
    base = sum(t.numel() * t.element_size() for t in tensors.values())
    adapters = trainable = 0
    for site in sites:
        size = site.parameters * getattr(torch, site.dtype).itemsize
        adapters += size
        trainable += size * site.trainable
    return Memory(base, adapters, trainable, _ADAMW_STATE * trainable)
