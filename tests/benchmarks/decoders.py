"""Llama-shaped decoders to train: the frozen base, lora_fx and PEFT, on one set of weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from tests.benchmarks.adapted import (
    Adapter,
    by_lora_fx,
    by_peft,
    trainable,
    training_step,
    twin,
)
from tests.benchmarks.interleaved import DEVICE, Build, Step

FLOOR = "frozen base, compiled per layer"
FLOOR_WHOLE = "frozen base, compiled whole"
OURS = "lora_fx, unit = layers"
OURS_AUGMENTED = "lora_fx, layout = augmented, in place"
OURS_WHOLE = "lora_fx, unit = model"
OURS_DRY = "lora_fx, unit = layers, dropout 0"
OURS_LORA = "lora_fx, unit = layers, LoRA"
OURS_LORA_AUGMENTED = "lora_fx, layout = augmented, in place, LoRA"
PEFT_LAYERS = "PEFT, bf16 adapters, compiled per layer"
PEFT_LAYERS_FP32 = "PEFT as shipped (fp32 adapters), compiled per layer"
PEFT_WHOLE = "PEFT, bf16 adapters, torch.compile(peft_model)"
PEFT_EAGER = "PEFT, bf16 adapters, eager"
PEFT_EAGER_FP32 = "PEFT as shipped (fp32 adapters), eager"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

HIDDEN, INNER, HEADS = "hidden_size", "intermediate_size", "num_attention_heads"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {HIDDEN: 4096, INNER: 14336, HEADS: 32},
    "small16": {HIDDEN: 2048, INNER: 8192, HEADS: 32},
    "tiny": {HIDDEN: 128, INNER: 352, HEADS: 16},
}


def config_of(shape: str, layers: int) -> LlamaConfig:
    """Return a config with 8 key-value heads, as Llama-3 has."""
    return LlamaConfig(
        num_hidden_layers=layers,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
        **SHAPES[shape],
    )


def frozen_base(shape: str, layers: int) -> LlamaModel:
    """Build a bf16 decoder with random weights on the GPU, or on the CPU if there is none."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaModel(config_of(shape, layers)).bfloat16().requires_grad_(False).train()


def training_steps(
    base: LlamaModel, adapter: Adapter, samples: int, tokens: int
) -> dict[str, Build]:
    """Return how to build each candidate's step, with gradients to bf16 embeddings too."""
    shape = (samples, tokens, base.config.hidden_size)
    embeddings = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    def built(build: Callable[[], Any]) -> Step:
        model = build()
        leaves = [embeddings, *trainable(model)]
        return training_step(
            lambda: [model(inputs_embeds=embeddings).last_hidden_state], [gradient], leaves
        )

    return {
        name: lambda build=build: built(build) for name, build in decoders(base, adapter).items()
    }


def decoders(base: LlamaModel, adapter: Adapter) -> dict[str, Callable[[], Any]]:
    """Return how to build each candidate.

    With dropout lora_fx without it is one more, and with another variant lora_fx's LoRA. What is
    adapted in place gets weights of its own, now, so that they do not count as held.
    """
    own = copy.deepcopy(base)
    dry = {OURS_DRY: lambda: by_lora_fx(base, adapter.dry(), "layers")}
    lora = adapter.plain()
    plain = {
        OURS_LORA: lambda: by_lora_fx(base, lora, "layers"),
        OURS_LORA_AUGMENTED: lambda: by_lora_fx(
            copy.deepcopy(base), lora, "layers", "augmented", inplace=True
        ),
    }
    return {
        FLOOR: lambda: per_layer(twin(base)),
        FLOOR_WHOLE: lambda: torch.compile(twin(base)),
        OURS: lambda: by_lora_fx(base, adapter, "layers"),
        OURS_AUGMENTED: lambda: by_lora_fx(own, adapter, "layers", "augmented", inplace=True),
        OURS_WHOLE: lambda: by_lora_fx(base, adapter, "model"),
        **(dry if adapter.dropout else {}),
        **(plain if adapter.variant != "lora" else {}),
        PEFT_LAYERS: lambda: per_layer(by_peft(base, adapter, upcast=False)),
        PEFT_LAYERS_FP32: lambda: per_layer(by_peft(base, adapter, upcast=True)),
        PEFT_WHOLE: lambda: torch.compile(by_peft(base, adapter, upcast=False)),
        PEFT_EAGER: lambda: by_peft(base, adapter, upcast=False),
        PEFT_EAGER_FP32: lambda: by_peft(base, adapter, upcast=True),
    }


def per_layer(model: nn.Module) -> nn.Module:
    """Compile the decoder's layers, in place."""
    decoder = next(m for m in model.modules() if isinstance(m, LlamaModel))
    for layer in decoder.layers:
        layer.compile()
    return model
