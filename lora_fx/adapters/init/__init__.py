"""How an adapter starts; one file per method.

A method takes the factors' shapes and a seeded generator and returns float32 A (r, in) and B
(out, r). Each parameter depends on seed, adapter name and site name only, so adding a target
changes no other site.
"""

import hashlib

import torch
from torch import Tensor

from lora_fx.adapters.init.block_diagonal import Method, block_diagonal
from lora_fx.adapters.init.default import default
from lora_fx.adapters.init.embedding import normal_start, zero_start
from lora_fx.adapters.init.gaussian import gaussian
from lora_fx.adapters.init.random import random
from lora_fx.plan.sites import SitePlan

METHODS: dict[str, dict[str, Method]] = {
    "linear": {"default": default, "gaussian": gaussian, "random": random},
    "embedding": {"default": zero_start, "gaussian": zero_start, "random": normal_start},
}


def initialise(site: SitePlan) -> dict[str, Tensor]:
    """Return a site's tensors by PEFT's names, in float32 on the CPU; B's bias starts at zero.

    Without DoRA's magnitude, which is of the weight.
    """
    kind = "embedding" if site.layer.kind == "embedding" else "linear"
    method = METHODS[kind][site.init.name]
    generator = generator_of(site.seed, site.adapter, site.name)
    if site.variant.name == "bdlora":
        A, B = block_diagonal(site, method, generator)
    else:
        A, B = method(site.in_features, site.out_features, site.rank, generator)
    first, second, *more = site.tensors
    biases = (name for name in more if name.endswith(".bias"))
    return {first: A, second: B} | {name: torch.zeros(site.tensors[name]) for name in biases}


def generator_of(seed: int, adapter: str, fqn: str) -> torch.Generator:
    """Return the source of an adapter's values at a site: no other site's change with it."""
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{fqn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
