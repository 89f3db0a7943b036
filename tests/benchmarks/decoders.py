"""Llama-shaped decoders to train: the frozen base, lora_fx and PEFT, on one set of weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import lora_fx
from tests.benchmarks.interleaved import DEVICE, Build, Step

FLOOR = "frozen base, compiled per layer"
FLOOR_WHOLE = "frozen base, compiled whole"
OURS = "lora_fx, unit = layers"
OURS_WHOLE = "lora_fx, unit = model"
OURS_DRY = "lora_fx, unit = layers, dropout 0"
PEFT_LAYERS = "PEFT, bf16 adapters, compiled per layer"
PEFT_LAYERS_FP32 = "PEFT as shipped (fp32 adapters), compiled per layer"
PEFT_WHOLE = "PEFT, bf16 adapters, torch.compile(peft_model)"
PEFT_EAGER = "PEFT, bf16 adapters, eager"
PEFT_EAGER_FP32 = "PEFT as shipped (fp32 adapters), eager"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

SHAPES = {
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32),
    "small16": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32),
    "tiny": dict(hidden_size=128, intermediate_size=352, num_attention_heads=16),
}


@dataclass(frozen=True)
class Adapter:
    """What lora_fx and PEFT alike put on the base; scaling is 2."""

    rank: int
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS


def frozen_base(shape: str, layers: int) -> LlamaModel:
    """Build a bf16 decoder with random weights on the GPU, or on the CPU if there is none."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_key_value_heads=8,
        vocab_size=1000,
        use_cache=False,
        **SHAPES[shape],
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaModel(config).to(torch.bfloat16).requires_grad_(False).train()


def training_steps(
    base: LlamaModel, adapter: Adapter, samples: int, tokens: int
) -> dict[str, Build]:
    """Return how to build the step of each candidate, all on the weights of `base`."""
    shape = (samples, tokens, base.config.hidden_size)
    embeddings = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    models = decoders(base, adapter)
    return {
        name: lambda model=model: training_step(model(), embeddings, gradient)
        for name, model in models.items()
    }


def decoders(base: LlamaModel, adapter: Adapter) -> dict[str, Callable[[], Any]]:
    """Return how to build each candidate; with dropout, lora_fx without it is one more."""
    dry = {OURS_DRY: lambda: ours(base, Adapter(adapter.rank, 0.0, adapter.targets), "layers")}
    return {
        FLOOR: lambda: per_layer(twin(base)),
        FLOOR_WHOLE: lambda: torch.compile(twin(base)),
        OURS: lambda: ours(base, adapter, "layers"),
        OURS_WHOLE: lambda: ours(base, adapter, "model"),
        **(dry if adapter.dropout else {}),
        PEFT_LAYERS: lambda: per_layer(by_peft(base, adapter, upcast=False)),
        PEFT_LAYERS_FP32: lambda: per_layer(by_peft(base, adapter, upcast=True)),
        PEFT_WHOLE: lambda: torch.compile(by_peft(base, adapter, upcast=False)),
        PEFT_EAGER: lambda: by_peft(base, adapter, upcast=False),
        PEFT_EAGER_FP32: lambda: by_peft(base, adapter, upcast=True),
    }


def training_step(model: nn.Module, embeddings: Tensor, gradient: Tensor) -> Step:
    """Return a forward and backward, to the embeddings and to what is trainable.

    Gradients are dropped after each step, as an optimizer's `zero_grad` does.
    """
    leaves = [embeddings, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        model(inputs_embeds=embeddings).last_hidden_state.backward(gradient)
        for leaf in leaves:
            leaf.grad = None

    return step


def ours(base: nn.Module, adapter: Adapter, unit: str) -> nn.Module:
    """Adapt the base with lora_fx, fp32 adapters."""
    spec = f"""lora 1
    adapter default {{
      rank = {adapter.rank}
      alpha = {2 * adapter.rank}
      dropout = {adapter.dropout}
      target {", ".join(adapter.targets)}
    }}
    compile {{ unit = {unit} }}"""
    return warm(lora_fx.compile(base, spec))


def by_peft(base: nn.Module, adapter: Adapter, upcast: bool) -> nn.Module:
    """Adapt the base with PEFT; `upcast` is its default, fp32 adapters."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
    )
    return warm(get_peft_model(twin(base), config, autocast_adapter_dtype=upcast))  # type: ignore[arg-type]


def warm(model: nn.Module) -> nn.Module:
    """Fill what starts as zero: multiplying zeros takes less power, which lifts the clocks."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def twin(base: nn.Module) -> nn.Module:
    """Copy the module tree, not the weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def per_layer(model: nn.Module) -> nn.Module:
    """Compile the decoder's layers, in place."""
    decoder = next(m for m in model.modules() if isinstance(m, LlamaModel))
    for layer in decoder.layers:
        layer.compile()
    return model
