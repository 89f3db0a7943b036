"""Starts of factors that consist of blocks, of which each is drawn for its own inputs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import blocks_of

Method = Callable[[int, int, int, torch.Generator], tuple[Tensor, Tensor]]


def block_diagonal(
    site: SitePlan, method: Method, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw A (r, in / blocks) or B (out, r / blocks) as `method` draws one of that width.

    With `init = default` the blocks of A are U(-√(6 / n), √(6 / n)) for n inputs of a block, as
    PEFT's are: He et al. 2015, arXiv 1502.01852, §2.2 with slope 0.
    """
    a, b = blocks_of(site)
    A, _ = method(site.in_features // a, site.out_features, site.rank, generator)
    _, B = method(site.in_features, site.out_features, site.rank // b, generator)
    return (A * math.sqrt(6) if a > 1 and site.init.name == "default" else A), B
