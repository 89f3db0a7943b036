"""What an init that looks at the weight is given of a site."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters.accelerator import start_device
from lora_fx.adapters.weights.changed_weight import original
from lora_fx.plan.offloaded import device_of
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word


@dataclass(frozen=True)
class Place:
    """A site: its weight (out, in) in float32 or wider, and what the plan says of its adapter.

    A convolution's `in` are its inputs at all places of the kernel.

    `observed` is what its init needs of data, see `observe`; without such an init it is empty.
    """

    weight: Tensor
    rank: int
    scaling: float
    init: Word
    generator: torch.Generator
    observed: Tensor


def place_of(
    site: SitePlan, module: nn.Module, generator: torch.Generator, observed: Tensor | None
) -> Place:
    """Return the site as its init sees it; the weight where the module runs, see `offload` too."""
    base = original(module, site.weight)
    device = start_device(site, device_of(module, base))
    values = base.to(device, torch.promote_types(base.dtype, torch.float32))
    turned = site.layer.kind not in ("linear", "conv", "attention")
    weight = values.T if turned else values.flatten(1)
    observed = weight.new_empty(0) if observed is None else observed
    return Place(weight, site.rank, site.scaling, site.init, generator, observed)
