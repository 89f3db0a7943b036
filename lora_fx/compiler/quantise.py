"""What a spec quantises, quantised: after its inits and merges have seen the whole weights."""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_fx.adapters.storage import is_of_adapters
from lora_fx.adapters.weights.quantise import quantise
from lora_fx.compiler.bind import Given
from lora_fx.plan.plan import Plan
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.runtime.progress import Report


def quantise_tree(tree: nn.Module, plan: Plan, given: Given, report: Report) -> None:
    """Pack what the plan says, in place; a Hugging Face model then says that it is quantised.

    DoRA's magnitudes that are not `given` start on what is packed.
    """
    started = [adapter for adapter in plan.adapters if adapter.name not in given]
    quantise(tree, plan.quantized, started, report)
    methods = {(module.method, module.storage) for module in plan.quantized.values()}
    if isinstance(tree, PreTrainedModel) and len(methods) == 1:
        _announce(tree, next(iter(plan.quantized.values())))


def _announce(tree: Any, how: QuantizedModule) -> None:
    """Say what transformers says of a model that it has loaded with such a config."""
    whole = [n for n, m in tree.named_modules() if type(m) is nn.Linear and not is_of_adapters(n)]
    config: dict[str, Any] = {"llm_int8_skip_modules": whole}
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
    tree.config.quantization_config = BitsAndBytesConfig(**config)
    tree.hf_quantizer = AutoHfQuantizer.from_config(
        tree.config.quantization_config, pre_quantized=False
    )
    tree.quantization_method = tree.hf_quantizer.quantization_config.quant_method
    tree.is_quantized = True
    setattr(tree, f"is_loaded_in_{8 if how.method.name == 'int8' else 4}bit", True)
