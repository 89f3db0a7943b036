"""Experts in a stack: each starts as a layer of its own would."""

import torch
from torch import Tensor

from lora_fx.adapters.init.block_diagonal import Method
from lora_fx.adapters.sites.parameter_site import join
from lora_fx.plan.sites import SitePlan


def stack(site: SitePlan, method: Method, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw A (E r, in) and B (out, r E), expert after expert."""
    sizes = site.in_features, site.out_features, site.rank
    drawn = [method(*sizes, generator) for _ in range(site.layer.experts)]
    return join(torch.stack([A for A, _ in drawn]), torch.stack([B for _, B in drawn]))
