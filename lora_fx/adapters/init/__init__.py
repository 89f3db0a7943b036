"""How an adapter starts; one file per method.

A method takes the factors' shapes and a seeded generator and returns float32 A (r, in) and B
(out, r). Each parameter depends on seed, adapter name and site name only, so adding a target
changes no other site.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from lora_fx.adapters.init.default import default
from lora_fx.adapters.init.gaussian import gaussian
from lora_fx.adapters.init.random import random

Method = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"default": default, "gaussian": gaussian, "random": random}


def initialise(
    method: str, in_features: int, out_features: int, rank: int, seed: int, adapter: str, fqn: str
) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) in float32 on the CPU."""
    return METHODS[method](in_features, out_features, rank, _generator(seed, adapter, fqn))


def _generator(seed: int, adapter: str, fqn: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{fqn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
