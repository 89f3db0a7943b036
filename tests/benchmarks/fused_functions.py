"""Fused functions of Unsloth and LoRAFusion, run on the modules of a PEFT model.

Neither is a dependency: without the package, building a candidate raises ImportError.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

Forward = Callable[[Any, Tensor], Any]
BARE = ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches")


class Fused(nn.Module):
    """A fused function in the place of a PEFT model's own forward."""

    def __init__(self, function: Forward, model: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.function(self.model.get_submodule("base_model.model"), x)


def checked(fused: Fused, x: Tensor) -> Fused:
    """Return it if it computes what its PEFT model does, outputs and all gradients.

    Raises ValueError otherwise: what computes something else is not worth timing. Dropout, which
    draws other numbers in each, is left out of the comparison.
    """
    dropouts = [module for module in fused.modules() if isinstance(module, nn.Dropout)]
    rates = [module.p for module in dropouts]
    for module in dropouts:
        module.p = 0.0
    got, want = _computed(fused, x), _computed(fused.model, x)
    for module, rate in zip(dropouts, rates, strict=True):
        module.p = rate
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True))
    bound = 4 * torch.finfo(x.dtype).eps
    if not off <= bound:
        raise ValueError(f"it differs from PEFT by {off:.2g}, more than {bound:.2g}")
    return fused


def _computed(model: nn.Module, x: Tensor) -> list[Tensor]:
    outputs = model(x)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    ramps = [torch.linspace(-1, 1, y.shape[-1]).to(y).expand_as(y) for y in outputs]
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(outputs, leaves, ramps)
    return [tensor.detach().float() for tensor in (*outputs, *gradients)]


def unsloth(block: str) -> Forward:
    """Return Unsloth's function of a module and its input.

    `inplace=False` leaves the input as it is, where Unsloth would write its gradient over it.
    """
    functions = _unsloth_functions()
    if block == "o":
        return functions.apply_lora_o
    name = {"qkv": "apply_lora_qkv", "mlp": "apply_lora_mlp_swiglu"}[block]
    return lambda module, x: getattr(functions, name)(module, x, inplace=False)


def lorafusion(block: str) -> Forward:
    """Return a function of a module and its input with each linear fused by LoRAFusion."""
    fused = import_module("lorafusion.ops.lora_v1").fused_linear_lora

    def linear(layer: Any, x: Tensor) -> Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
        weight, scaling = layer.base_layer.weight, layer.scaling["default"]
        return fused(x, weight, a, b, alpha=scaling, dropout_p=dropout)

    def mlp(module: Any, x: Tensor) -> Tensor:
        inner = silu(linear(module.gate_proj, x)) * linear(module.up_proj, x)
        return linear(module.down_proj, inner)

    def qkv(module: Any, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(p, x) for p in (module.q_proj, module.k_proj, module.v_proj))

    return {"qkv": qkv, "o": lambda module, x: linear(module.o_proj, x), "mlp": mlp}[block]


def _unsloth_functions() -> Any:
    """Import Unsloth's functions alone: importing its packages patches transformers and PEFT."""
    for name in BARE:
        if name not in sys.modules:
            spec = find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named '{name}'")
            sys.modules[name] = module_from_spec(spec)
    return import_module("unsloth.kernels.fast_lora")
