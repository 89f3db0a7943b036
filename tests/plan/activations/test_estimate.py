"""Estimates beside what the marked model really keeps on the CPU after a forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import lora_fx
from lora_fx.plan.activations.example import example_of
from tests.architectures import ARCHITECTURES
from tests.plan.activations.live import Live

SAMPLES, TOKENS = 2, 128
LINEAR = "lora 1 adapter x { rank = 8 target linear }"
SPECS = {
    "all linears": LINEAR,
    "no gradient below the first site": "lora 1 adapter x { target q_proj in layers[2..] }",
    "dropout copies the input": "lora 1 adapter x { dropout = 0.1 target q_proj, k_proj }",
    "a wider compute dtype": "lora 1 adapter x { compute = float32 target linear }",
    "replicated layers": "lora 1 layers { replicate 0..3, 1..4 } adapter x { target linear }",
    "the first adapter is active": f"{LINEAR} adapter y {{ rank = 100 target linear }}",
    "an embedding": "lora 1 adapter x { target embed_tokens }",
    "a trained head": "lora 1 adapter x { target down_proj in layers[3] train lm_head }",
    "a trained module of a layer": "lora 1 adapter x { target q_proj train mlp in layers[2] }",
}


def llama(dtype: torch.dtype, **settings: Any) -> LlamaForCausalLM:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 600,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 500,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | settings)).to(dtype).train()


def kept(model: nn.Module, spec: str, loss: Callable[[Any], Tensor], **inputs: Any) -> int:
    """Bytes alive when nothing is left of a forward but its loss."""
    compiled = lora_fx.compile(model, spec, backend=None).train()
    live = Live(compiled)
    with live:
        only = loss(compiled(**inputs))
    assert only.requires_grad
    return live.bytes()


def uncompiled(text: str, model: nn.Module) -> int:
    """The estimate for a model that is only marked."""
    plan = lora_fx.plan(text, model)
    return plan.activations(SAMPLES, TOKENS, compiled=False).bytes


def kept_of_llama(model: nn.Module, spec: str = LINEAR) -> int:
    ids = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    return kept(model, spec, lambda o: o.loss, input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=name, marks=() if text == LINEAR else pytest.mark.slow)
        for name, text in SPECS.items()
    ],
)
def test_of_compiled_layers(text: str) -> None:
    model = llama(torch.bfloat16)
    plan = lora_fx.plan(text, model)
    estimate = plan.activations(SAMPLES, TOKENS).bytes
    tolerance = 0.07 if "dropout" in text else 0.02
    assert estimate == pytest.approx(saved(lora_fx.compile(model, text)), rel=tolerance)
    assert estimate < 0.95 * plan.activations(SAMPLES, TOKENS, compiled=False).bytes


def saved(model: nn.Module) -> int:
    """Bytes of what autograd is given to keep by a forward, the model's own tensors aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    ids = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids, use_cache=False)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("text", SPECS.values(), ids=SPECS)
def test_of_a_llama(text: str) -> None:
    model = llama(torch.bfloat16)
    estimate = uncompiled(text, model)
    assert estimate == pytest.approx(kept_of_llama(model, text), rel=0.01)


def test_of_a_llama_in_float32() -> None:
    model = llama(torch.float32)
    estimate = uncompiled(LINEAR, model)
    assert estimate == pytest.approx(kept_of_llama(model), rel=0.01)


def test_what_is_frozen_keeps_nothing() -> None:
    frozen = "lora 1 adapter x { trainable = false target linear }"
    assert (
        lora_fx.plan(frozen, llama(torch.bfloat16))
        .activations(SAMPLES, TOKENS, compiled=False)
        .bytes
        == 0
    )


def test_attention_that_is_not_fused_keeps_its_scores() -> None:
    fused, eager = (llama(torch.float32, attn_implementation=a) for a in ("sdpa", "eager"))
    estimates = [uncompiled(LINEAR, m) for m in (fused, eager)]
    assert estimates[1] == pytest.approx(kept_of_llama(eager), rel=0.01)
    assert estimates[1] > 1.2 * estimates[0]


def test_twice_the_tokens_are_twice_the_bytes() -> None:
    plan = lora_fx.plan(LINEAR, llama(torch.bfloat16))
    small, long, many = (plan.activations(*size).bytes for size in ((2, 64), (2, 128), (4, 64)))
    assert 1.8 * small < long < 2 * small
    assert many == pytest.approx(long, rel=0.01)


def test_checkpointed_layers_keep_their_inputs_and_one_layer() -> None:
    whole, shorter = (llama(torch.float32, num_hidden_layers=n) for n in (4, 3))
    spec = f"{LINEAR} compile {{ checkpoint = layers }}"
    layer = kept_of_llama(whole) - kept_of_llama(shorter)
    expected = kept_of_llama(whole, spec) + layer
    estimate = uncompiled(spec, whole)
    assert estimate == pytest.approx(expected, rel=0.05)
    assert estimate < 0.6 * kept_of_llama(whole)


def test_a_budget_lies_between() -> None:
    def estimate(checkpoint: str) -> int:
        spec = f"{LINEAR} compile {{ checkpoint = {checkpoint} }}"
        return uncompiled(spec, llama(torch.bfloat16))

    none, half, all_ = estimate("none"), estimate("budget(0.5)"), estimate("layers")
    assert half == pytest.approx((none + all_) / 2, rel=0.001)


def test_lora_fa_keeps_no_inputs_for_a() -> None:
    model = llama(torch.float32)
    fa = lora_fx.plan(f"{LINEAR} optimizer {{ name = lora_fa lr = 1e-4 }}", model)
    assert fa.activations(2, 128).bytes < lora_fx.plan(LINEAR, model).activations(2, 128).bytes


def test_all_adapters_where_a_route_trains_all() -> None:
    text = f"{LINEAR} adapter y {{ rank = 100 target linear }}"
    model = llama(torch.bfloat16)
    routed = lora_fx.plan(f"{text} route {{ train = true }}", model).activations(2, 128).bytes
    assert routed > 1.3 * lora_fx.plan(text, model).activations(2, 128).bytes


NAMES = ("gpt2", "bloom", "falcon", "phi", "gemma3_text", "mixtral", "mamba2", "t5", "whisper")


@pytest.mark.parametrize("name", [*NAMES, "bert", "vit", "llava"])
def test_of_other_architectures(name: str) -> None:
    model = without_dropout(ARCHITECTURES[name]()).train()
    spec = "lora 1 adapter x { rank = 4 target linear where module.out_features >= 8 }"
    plan = lora_fx.plan(spec, model)
    inputs = {
        key: torch.ones(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
        for key, value in example_of(model, 2, 16).inputs.items()
    }
    real = kept(model, spec, cross_entropy, **inputs)
    assert plan.activations(2, 16, compiled=False).bytes == pytest.approx(real, rel=0.02)


def cross_entropy(outputs: Any) -> Tensor:
    rows = outputs.logits.float().flatten(0, -2)
    return F.cross_entropy(rows, torch.ones(len(rows), dtype=torch.long))


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Fused attention has no dropout on the CPU."""
    for config in (model.config, *vars(model.config).values()):
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
    return type(model)(model.config)
