"""VeLoRA's directions follow what a module gets while it learns: `graph/velora.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_fx.adapters.sites.choice import Added
from lora_fx.graph.own_tensors import require_samples
from lora_fx.graph.velora import mean_direction


def follow(added: Iterable[Added], x: Tensor, shares: Tensor | None = None) -> None:
    """Let the directions of these branches follow x (*, in), in place.

    In a mixed batch `shares` (S, adapters) are those of the samples x (S, …, in). Each direction
    follows the samples that its adapter has a share in, as if they were the whole batch, and stays
    as it is where there are none.
    """
    for one in added:
        direction, kept = one.factors.direction, one.arithmetic.compression
        if direction is None or kept is None or kept.init == "random":
            continue
        own = None
        if shares is not None and one.column is not None:
            require_samples(x.shape[0], shares.shape[0])
            own = shares[:, one.column] != 0
        before = direction.weight
        mean = mean_direction(x, kept.groups, own)
        if kept.init == "batch_average_once":
            mean = torch.where(torch.any(before), before, mean)
        before.copy_(mean if own is None else torch.where(own.any(), mean, before))
