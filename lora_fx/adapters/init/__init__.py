"""How an adapter starts; one file per method.

A method is given the factors' shapes and a seeded generator, or a `Place` with the weight, and
returns A (r, in) and B (out, r). Each parameter depends on seed, adapter name, site name and weight
only, so adding a target changes no other site.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_fx.adapters.init.block_diagonal import Method, block_diagonal
from lora_fx.adapters.init.convolution import convolution
from lora_fx.adapters.init.corda import corda
from lora_fx.adapters.init.default import default
from lora_fx.adapters.init.embedding import normal_start, zero_start
from lora_fx.adapters.init.gaussian import gaussian
from lora_fx.adapters.init.loftq import loftq
from lora_fx.adapters.init.lora_ga import lora_ga
from lora_fx.adapters.init.mica import mica
from lora_fx.adapters.init.olora import olora
from lora_fx.adapters.init.orthogonal import orthogonal
from lora_fx.adapters.init.pissa import pissa
from lora_fx.adapters.init.place import Place, place_of
from lora_fx.adapters.init.random import random
from lora_fx.adapters.init.stack import stack
from lora_fx.adapters.weights import copies
from lora_fx.plan.offloaded import device_of
from lora_fx.plan.sites import LOOKS_AT_BASE, SitePlan

METHODS: dict[str, dict[str, Method]] = {
    "linear": {
        "default": default,
        "gaussian": gaussian,
        "random": random,
        "orthogonal": orthogonal,
    },
    "embedding": {"default": zero_start, "gaussian": zero_start, "random": normal_start},
}
OF_WEIGHT: Mapping[str, Callable[[Place], tuple[Tensor, ...]]] = {
    "mica": mica,
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
    "corda": corda,
    "lora_ga": lora_ga,
}

_DIAGONAL = "lora_diag"
OF_DATA = frozenset({"corda", "lora_ga", "eva"})
LOOKS_AT = LOOKS_AT_BASE | OF_DATA


def initialise(
    site: SitePlan, module: nn.Module, observed: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a site on its module by PEFT's names; B's bias starts at zero.

    KaSA's diagonal is drawn from N(0, 1), MonteCLoRA's priors between 0 and 1.

    Without DoRA's magnitude, which is of the weight. In float32, or wider where an init computes of
    a wider weight. `weight` is among them where the base's is to be another, and not what it was
    without s B A. `observed` is what the init needs of data. On meta an init that looks at values
    gives zeros.
    """
    generator = generator_of(site.seed, site.adapter, site.name)
    weight: Sequence[Tensor] = ()
    if site.init.name in LOOKS_AT and is_without_values(module, site.weight):
        A, B, *_ = map(torch.zeros, site.tensors.values())
    elif site.init.name == "eva":
        assert observed is not None
        A, B = observed, torch.zeros(site.out_features, site.rank)
    elif site.init.name in OF_WEIGHT:
        A, B, *weight = OF_WEIGHT[site.init.name](place_of(site, module, generator, observed))
    else:
        kind = "embedding" if site.layer.kind == "embedding" else "linear"
        method = METHODS[kind][site.init.name]
        if site.variant.name == "bdlora":
            A, B = block_diagonal(site, method, generator)
        elif site.layer.kind == "conv":
            A, B = convolution(site, method, generator)
        elif site.layer.experts > 1:
            A, B = stack(site, method, generator)
        else:
            A, B = method(site.in_features, site.out_features, site.rank, generator)
    first, second, *more = site.tensors
    turned = [one if site.layer.kind == "linear" else one.T for one in weight]
    given = dict(zip(("weight",), turned, strict=False))
    biases = (name for name in more if name.endswith(".bias"))
    zeros = {name: torch.zeros(site.tensors[name]) for name in biases}
    drawn = {n: torch.randn(site.tensors[n], generator=generator) for n in more if n == _DIAGONAL}
    priors = (name for name in more if name.endswith("_prior"))
    drawn |= {name: torch.rand(site.tensors[name], generator=generator) for name in priors}
    factors = {first: A, second: B}
    own = {name: t.reshape(site.tensors[name]).contiguous() for name, t in factors.items()}
    return {**own, **zeros, **drawn, **given}


def is_without_values(module: nn.Module, name: str = "weight") -> bool:
    """Whether a weight of a module is on meta, and no store has its values."""
    weight = copies.base_tensor(module, name)
    assert weight is not None
    return device_of(module, weight).type == "meta"


def generator_of(seed: int, adapter: str, fqn: str) -> torch.Generator:
    """Return the source of an adapter's values at a site: no other site's change with it."""
    digest = hashlib.sha256(f"{seed}\0{adapter}\0{fqn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
