"""What a Hugging Face model says of its weights in 4 or 8 bits, as transformers would have it."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_fx.adapters.storage import base_modules
from lora_fx.plan.packed import packing_of
from lora_fx.plan.quantization import QuantizedModule


def announce_packed(tree: nn.Module, how: QuantizedModule) -> None:
    """Say what transformers says of a model that it has loaded with such a config."""
    if not isinstance(tree, PreTrainedModel):
        return
    config: dict[str, Any] = {"llm_int8_skip_modules": _whole(tree)}
    if how.method.name == "int8":
        config |= {"load_in_8bit": True, "llm_int8_threshold": how.method.argument("threshold")}
    else:
        config |= {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": how.method.name,
            "bnb_4bit_use_double_quant": how.method.argument("double_quant"),
            "bnb_4bit_compute_dtype": getattr(torch, how.method.argument("compute_dtype").name),  # type: ignore[union-attr]
            "bnb_4bit_quant_storage": getattr(torch, how.storage),
        }
    _say(tree, BitsAndBytesConfig(**config), False)
    setattr(tree, f"is_loaded_in_{8 if how.method.name == 'int8' else 4}bit", True)


def announce_plain(tree: nn.Module) -> None:
    """Say which linear layers are not packed, now that some no longer are, or that none is."""
    told: Any = getattr(getattr(tree, "config", None), "quantization_config", None)
    if not isinstance(tree, PreTrainedModel) or told is None:
        return
    if any(packing_of(module) is not None for module in base_modules(tree).values()):
        if isinstance(told, BitsAndBytesConfig):
            told = copy.copy(told)
            told.llm_int8_skip_modules = _whole(tree)
            _say(tree, told, bool(getattr(tree.hf_quantizer, "pre_quantized", False)))
        return
    tree.hf_quantizer.remove_quantization_config(tree)  # type: ignore[union-attr]
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(tree).pop(name, None)


def _say(tree: Any, config: BitsAndBytesConfig, pre_quantized: bool) -> None:
    tree.config.quantization_config = config
    tree.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)
    tree.quantization_method = tree.hf_quantizer.quantization_config.quant_method
    tree.is_quantized = True


def _whole(tree: nn.Module) -> list[str]:
    """Return the linear layers that are not packed."""
    return [
        fqn
        for fqn, module in base_modules(tree).items()
        if isinstance(module, nn.Linear) and packing_of(module) is None
    ]
