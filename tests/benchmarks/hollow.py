"""A Llama-3-8B of full shapes whose weights take no memory, for what never reads them."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SITES = 224
SPEC = "lora 1 adapter default { rank = 16 alpha = 32 dtype = DTYPE init = INIT target linear }"


def spec(dtype: str = "float32", init: str = "default") -> str:
    return SPEC.replace("DTYPE", dtype).replace("INIT", init)


def hollow_llama() -> LlamaForCausalLM:
    """Return the model in bfloat16 on the CPU; every weight is one zero, seen at every place."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(zero, requires_grad=False))
        for name, values in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros_like(values, device="cpu"), persistent=False)
    return model
