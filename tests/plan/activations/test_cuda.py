"""Estimates beside the memory that a step really takes on a GPU."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

pytestmark = pytest.mark.gpu
SAMPLES, TOKENS = 2, 1024
LINEAR = "lora 1 adapter x { rank = 16 target linear }"


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=2000,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def measured(spec: str, backend: Any) -> tuple[int, int, int]:
    """Bytes: estimated; alive when a forward has left only its loss; at the peak of a step."""
    model = llama()
    plan = lora_fx.plan(spec, model)
    estimate = plan.activations(SAMPLES, TOKENS, compiled=backend is not None).bytes
    compiled = lora_fx.compile(model, spec, backend=backend).train()
    ids = torch.ones(SAMPLES, TOKENS, dtype=torch.long, device="cuda")
    for _ in range(2):  # compiles, and makes the gradients
        compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    print(f"{backend} {spec[44:]}: estimated {estimate:,d}, kept {kept:,d}, peak {peak:,d}")
    return estimate, kept, peak


def test_what_the_marked_model_keeps() -> None:
    estimate, kept, peak = measured(LINEAR, None)
    assert estimate == pytest.approx(kept, rel=0.05)
    assert estimate < peak < 1.25 * estimate


def test_the_peak_with_checkpointed_layers() -> None:
    estimate, kept, peak = measured(f"{LINEAR} compile {{ checkpoint = layers }}", None)
    assert kept < 0.5 * estimate
    assert estimate == pytest.approx(peak, rel=0.25)


def test_what_compiled_layers_keep() -> None:
    estimate, kept, peak = measured(LINEAR, "inductor")
    assert estimate == pytest.approx(kept, rel=0.05)
    assert estimate < peak < 1.25 * estimate
