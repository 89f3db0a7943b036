"""Starts of a convolution's factors."""

import math

import torch
from torch import Tensor

from lora_fx.adapters.init.block_diagonal import Method
from lora_fx.plan.sites import SitePlan


def convolution(
    site: SitePlan, method: Method, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A (r, in · k) and B (out, r / groups) as `method` draws matrices of these rows.

    What a row of A is made for is all inputs at all places of the kernel, as in `nn.Conv2d`.
    """
    inputs = site.in_features * math.prod(site.layer.kernel)
    A, B = method(inputs, site.out_features, site.rank, generator)
    if site.layer.groups > 1:
        _, B = method(inputs, site.out_features, site.rank // site.layer.groups, generator)
    return A, B
