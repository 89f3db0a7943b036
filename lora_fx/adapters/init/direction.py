"""Where VeLoRA's direction starts."""

import torch
from torch import Tensor

from lora_fx.graph.velora import width_of
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import compression_of


def start_direction(site: SitePlan, generator: torch.Generator) -> Tensor:
    """Return zeros (width,), to be filled from the first input; with `random`, a unit vector."""
    groups, _, init = compression_of(site)
    width = width_of(site.in_features, groups)
    if init != "random":
        return torch.zeros(width)
    return torch.nn.functional.normalize(torch.empty(width).normal_(generator=generator), dim=0)
