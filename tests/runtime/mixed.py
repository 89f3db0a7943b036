"""A small model with adapters that differ in all they can, and what each sample should give."""

from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from tests.tiny import llama, tokens

SPEC = """lora 1
adapter a { rank = 4  alpha = 6  init = random  target linear }
adapter b { rank = 3  alpha = 5  scaling = rslora  init = random  target q_proj, "**.{up,down}_proj"
}
adapter c { rank = 5  scaling = 0.7  lora_bias = true  init = random  target v_proj, embed_tokens {
  lora_bias = false
} }
adapter d { rank = 2  variant = dora  init = random  target v_proj, up_proj }
route {
  train = true
  when "half" -> 0.5 * a - 0.25 * b
  when "dora" -> 0.4 * d + a
}
"""
NAMES = ["b", "a", "__base__", "half", "d", "c", "dora", "a"]


def mixed(spec: str = SPEC, backend: str | None = "inductor", layers: int = 2) -> nn.Module:
    """Return a compiled model whose adapters' factors are all drawn anew, so that all act."""
    model = lora_fx.compile(llama(layers), spec, backend=backend).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and "start" not in name:
            parameter.data.normal_(std=0.2, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


def alone(model: Any, name: str, **inputs: Tensor) -> Tensor:
    """The logits of samples that all have one adapter, by the model's own means without names."""
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


def samples(count: int = len(NAMES)) -> Tensor:
    return tokens(count, 17)
