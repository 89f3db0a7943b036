"""Base weights that bitsandbytes has packed in 4 or 8 bits: how, their tensors and their values."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.graph.packing import Packing
from lora_fx.plan.modules import outside_adapters


def packing_of(module: nn.Module) -> Packing | None:
    """Return how the weight of a linear layer is packed, None if it is not."""
    weight: Any = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = state.state2.blocksize if state.nested else 0
        shape = tuple(state.shape)
        return Packing(state.quant_type, shape, state.dtype, state.blocksize, nested)  # type: ignore[arg-type]
    if weight is not None and weight.dtype is torch.int8 and hasattr(module, "state"):
        return Packing("int8", tuple(weight.shape), torch.float32)  # type: ignore[arg-type]
    return None


def packed_tensors(module: nn.Module) -> list[Tensor]:
    """Return what a packed weight consists of, in the order of `graph/packing.py`."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight.data, scales_of_rows(module)]
    if state.nested:
        own = state.state2
        return [weight.data, state.absmax, state.offset, own.absmax, own.code]
    return [weight.data, state.absmax]


def unpacked(module: nn.Module) -> Tensor:
    """Return the values of a packed weight (out, in), in the dtype that it was packed from.

    Of 8 bits in float32.
    """
    packing = packing_of(module)
    assert packing is not None
    return packing.values(packed_tensors(module))


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype that a model's weights are in where they are not packed, None if nowhere."""
    for _, module in outside_adapters(model):
        for parameter in () if packing_of(module) else module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.itemsize > 1:
                return parameter.dtype
    return None


def scales_of_rows(module: Any) -> Tensor:
    """Return the scales of a weight in 8 bits: the layer's, or first the weight's."""
    found = module.state.SCB
    return module.weight.SCB if found is None else found
