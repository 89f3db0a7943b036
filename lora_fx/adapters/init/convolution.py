"""Starts of a convolution's factors."""

import math

import torch
from torch import Tensor

from lora_fx.adapters.init.block_diagonal import Method
from lora_fx.plan.sites import SitePlan


def convolution(
    site: SitePlan, method: Method, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A (r, in, k…) and B (out, r / groups, 1…) as `method` draws matrices of these rows.

    What a row of A is made for is all inputs at all places of the kernel, as in `nn.Conv2d`.
    """
    shape_a, shape_b = list(site.layer.shapes(site.rank).values())
    rank, *inputs = shape_a
    A, _ = method(math.prod(inputs), site.out_features, rank, generator)
    _, B = method(math.prod(inputs), site.out_features, shape_b[1], generator)
    return A.view(shape_a), B.view(shape_b)
