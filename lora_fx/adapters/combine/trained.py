"""What adapters trained of the base, combined: base + Σ wᵢ (ownᵢ − base).

A copy, a bias or a row is not a delta, it stands in the place of the base's. What it changed is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_fx.adapters import token_rows
from lora_fx.adapters.weights import copies
from lora_fx.plan.offloaded import values_of

Weights = Mapping[str, float]  # of adapters, by name


def combined_copy(module: nn.Module, name: str, weights: Weights) -> Tensor:
    """Return the combined version of a module's tensor; what is no float is the first one's."""
    own = {
        adapter: copies.tensors(module, adapter)[name]
        for adapter in weights
        if copies.has(module, adapter) and name in copies.tensors(module, adapter)
    }
    base = copies.base_tensor(module, name)
    assert base is not None
    if own and not base.is_floating_point():
        return next(iter(own.values())).detach().clone()
    base = values_of(module, name, base)
    return _moved(
        base, {adapter: tensor.to(base.device) for adapter, tensor in own.items()}, weights
    )


def combined_rows(module: nn.Embedding, ids: tuple[int, ...], weights: Weights) -> Tensor:
    """Return the combined rows (n, width) of these ids, float32 or wider."""
    whole = copies.base_tensor(module, "weight")
    assert whole is not None
    base = values_of(module, "weight", whole)[list(ids)]
    own: dict[str, Tensor] = {}
    for adapter in weights:
        for rows in token_rows.rows_of(module, adapter):
            values = base.to(rows.weight.dtype).clone()
            places = [ids.index(token) for token in rows.ids]
            values[places] = rows.weight.detach().to(values.device)
            own[adapter] = values
    wide = torch.promote_types(base.dtype, torch.float32)
    return _moved(base.to(wide), own, weights)


def _moved(base: Tensor, own: Mapping[str, Tensor], weights: Weights) -> Tensor:
    if len(own) == 1 and weights[next(iter(own))] == 1:
        return next(iter(own.values())).detach().to(base.dtype).clone()
    wide = torch.promote_types(base.dtype, torch.float32)
    start = base.detach().to(wide)
    moves = [weights[name] * (own[name].detach().to(start) - start) for name in own]
    return sum(moves, start).to(base.dtype)
