"""Layers in 4 or 8 bits become plain linear layers again, with what is merged into them.

    W' = values of the packed weight + Σ s B A        rounded once, to the dtype of the model

The values are those that the packed layer computes with, which adapters were trained over.
"""

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from lora_fx.adapters.dynamic_class import base_of, rebase
from lora_fx.adapters.weights.quantise import packed_values
from lora_fx.plan.dequantized import Dequantized


def make_plain(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Make a layer in 4 or 8 bits an `nn.Linear` with these tensors, in place.

    Its own bias goes with the weight's dtype. The packed weight stays as it is.
    """
    example = Linear8bitLt if issubclass(base_of(type(module)), Linear8bitLt) else Linear4bit
    for name in vars(example(1, 1, device="meta")).keys() - vars(nn.Linear(1, 1)).keys():
        vars(module).pop(name, None)
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if _is_of_bitsandbytes(hook)]:
        del hooks[key]
    rebase(module, nn.Linear)
    own = {} if module.bias is None else {"bias": module.bias.detach()}
    for name, tensor in {**own, **tensors}.items():
        value = tensor.to(tensors["weight"].dtype)
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _is_of_bitsandbytes(hook: Any) -> bool:
    return getattr(hook, "hook", hook).__module__.startswith("bitsandbytes")


@torch.no_grad()
def as_if_packed(tree: nn.Module, dequantized: Dequantized) -> None:
    """Give modules that merges go into the values that the spec's packing has of their weights.

    In place, in the weights' own dtype. Modules that share a weight share the new one.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for fqn, planned in dequantized.items():
        module = tree.get_submodule(fqn)
        weight = module._parameters["weight"]
        if planned is not None and weight is not None and not weight.is_meta:
            if id(weight) not in made:
                values = packed_values(weight, planned).to(weight.dtype)
                made[id(weight)] = weight, nn.Parameter(values, requires_grad=False)
            module._parameters["weight"] = made[id(weight)][1]
