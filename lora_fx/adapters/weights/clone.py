"""A second module tree over the same base weights.

Per original Parameter one new `Parameter(p.detach(), requires_grad=False)` on the same storage;
ties stay ties. Offloaded weights stay in the store that they are in. Buffers and everything else
are copied. The given model is not changed, and nothing done to the clone's flags, modes, device or
dtype reaches it.
"""

import copy
from typing import Any

import torch
from torch import nn

from lora_fx.plan.offloaded import weight_stores

# what it keeps in a dispatched model: these would move the given one
_METHODS_OF_ACCELERATE = {"to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"}


def clone(model: nn.Module) -> nn.Module:
    """Return the clone. Frozen throughout; training mode as given."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _alias(parameter)
    for module in model.modules():
        memo |= {id(tensor): tensor for tensor in _numbers_of_rows(module)}
    for store in weight_stores(model):
        memo[id(store)] = store
    twin = copy.deepcopy(model, memo)
    for name in _METHODS_OF_ACCELERATE & vars(twin).keys():
        del vars(twin)[name]
    for module in twin.modules():
        _own_quantised_weight(module)
    return twin


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    if hasattr(parameter, "quant_state"):
        return _alias_quantised(parameter)
    if hasattr(parameter, "CB"):
        return _alias_of_rows(parameter)
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _alias_quantised(parameter: Any) -> Any:
    """Bitsandbytes' `Params4bit`: the packed bytes are shared, the state object is not.

    `module` is left out here, or the deep copy would follow it into a second tree.
    """
    twin = type(parameter)(
        parameter.detach().as_subclass(torch.Tensor),
        requires_grad=False,
        quant_state=_copy_state(parameter.quant_state),
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        bnb_quantized=parameter.bnb_quantized,
    )
    return twin


def _alias_of_rows(parameter: Any) -> Any:
    """Bitsandbytes' `Int8Params`: the numbers are shared, and so are their scales."""
    data = parameter.detach().as_subclass(torch.Tensor)
    twin = type(parameter)(data, requires_grad=False, has_fp16_weights=parameter.has_fp16_weights)
    twin.CB = None if parameter.CB is None else twin.data
    twin.SCB = parameter.SCB
    return twin


def _numbers_of_rows(module: nn.Module) -> list[torch.Tensor]:
    """Return the numbers and scales that a layer in 8 bits keeps beside its weight."""
    state: Any = getattr(module, "state", None)
    found = (getattr(state, name, None) for name in ("CB", "SCB"))
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def _copy_state(state: Any) -> Any:
    if state is None:
        return None
    twin = copy.copy(state)
    if getattr(state, "state2", None) is not None:
        twin.state2 = copy.copy(state.state2)
    return twin


def _own_quantised_weight(module: nn.Module) -> None:
    """Point a 4-bit weight at its new module, and keep it from being repacked in place.

    On a CPU with AVX512-bf16, bitsandbytes repacks the weight inside the first evaluation forward:
    a mutation that no compiled graph may contain and that moves the numbers between two calls.
    """
    weight = module._parameters.get("weight")
    if weight is not None and hasattr(weight, "quant_state"):
        weight.module = module  # type: ignore[attr-defined]
        module.quant_state = weight.quant_state  # type: ignore[attr-defined]
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if weight is not None and hasattr(weight, "CB"):
        _own_rows(module, weight)


def _own_rows(module: Any, weight: Any) -> None:
    """Give a layer in 8 bits its numbers and scales as its first forward would: nothing mutates."""
    if weight.CB is not None:
        module.init_8bit_state()
    if not module.state.has_fp16_weights:
        module.state.CB = weight.data
