"""What an init that looks at the weight is given of a site."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters import copies
from lora_fx.plan.offloaded import device_of, values_of
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word


@dataclass(frozen=True)
class Place:
    """A site: its weight (out, in) in float32 or wider, and what the plan says of its adapter."""

    weight: Tensor
    rank: int
    scaling: float
    init: Word
    generator: torch.Generator


def place_of(site: SitePlan, module: nn.Module, generator: torch.Generator) -> Place:
    """Return the site as its init sees it; the weight on the device where the module runs."""
    tensor = copies.base_tensor(module, "weight")
    assert tensor is not None
    values = values_of(module, "weight", tensor).to(device_of(module, tensor))
    weight = as_matrix(site, values.to(torch.promote_types(values.dtype, torch.float32)))
    return Place(weight, site.rank, site.scaling, site.init, generator)


def as_matrix(site: SitePlan, weight: Tensor) -> Tensor:
    """Return a layer's weight as (out, in), or such a matrix as the weight: a view."""
    return weight if site.layer.kind == "linear" else weight.T
