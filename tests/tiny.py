"""Tiny random models of real architectures, and the steps that tests compare."""

import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.dense import relative

VOCABULARY = 101
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}


def llama(layers: int = 2, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, num_key_value_heads=2, **SIZES | settings)
    return LlamaForCausalLM(config)


def qwen3(layers: int = 2) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(num_hidden_layers=layers, num_key_value_heads=2, head_dim=8, **SIZES)
    return Qwen3ForCausalLM(config)


def mistral(layers: int = 2) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=layers, num_key_value_heads=2, sliding_window=8, **SIZES
    )
    return MistralForCausalLM(config)


def gpt_neox(layers: int = 2) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=layers, **SIZES))


def tokens(samples: int = 3, length: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(samples * 1000 + length)
    return torch.randint(1, VOCABULARY, (samples, length), generator=generator)


def spec(unit: str = "layers", adapter: str = "rank = 4 alpha = 6", more: str = "") -> str:
    """One adapter on all linears, random from the start, so that it acts."""
    return f"""lora 1
adapter default {{ {adapter} init = random target linear }}
compile {{ unit = {unit} }}
{more}"""


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Loss and the gradient of every trainable parameter, by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 3e-5) -> None:
    """Every tensor within the tolerance of a tensor that is not zero.

    Float32 gradients that have come through thirty layers differ by 1.2e-5 on some processors.
    """
    assert got.keys() == want.keys()
    assert len(want) > 1
    for name, tensor in want.items():
        assert tensor.norm() > 0, name
        assert relative(got[name], tensor) <= tolerance, name


def assert_differ(a: Iterable[Tensor], b: Iterable[Tensor]) -> None:
    """The negative control: far apart."""
    assert max(relative(x, y) for x, y in zip(a, b, strict=True)) > 1e-2


def generate(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


def checkpointing(model: PreTrainedModel, reentrant: bool) -> None:
    """Switch activation checkpointing on under the name that this transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def uncached() -> AbstractContextManager[None]:
    """Compile anew what is compiled in here, whatever the caches of earlier runs hold."""
    return torch.compiler.config.patch(cache_key_tag=f"uncached {uuid.uuid4()}")


def graphs() -> int:
    """Graphs Dynamo has made so far, by its own counter."""
    return counters["stats"]["unique_graphs"]
