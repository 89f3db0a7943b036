"""Fused functions of Unsloth and LoRAFusion, run on the modules of a PEFT model.

Neither is a dependency: without the package, building a candidate raises ImportError.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

from torch import Tensor
from torch.nn.functional import silu

Forward = Callable[[Any, Tensor], Any]
BARE = ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches")


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
