"""What is upcast before a base in 4 bits is trained through."""

import warnings
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training

import lora_fx
from tests.dense import relative
from tests.quantised import nf4
from tests.tiny import llama, step, tokens


def short() -> Any:
    return llama(2, attention_bias=True).to(torch.bfloat16)


def test_all_is_what_peft_upcasts() -> None:
    ours, theirs = short(), short()
    found = lora_fx.prepare_for_kbit_training(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    want = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == want
    assert found.keys() == want.keys()
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_norms_and_biases_are_what_costs_little() -> None:
    model = short()
    found = lora_fx.prepare_for_kbit_training(model, "norms")
    for name, parameter in model.named_parameters():
        few = parameter.dim() == 1
        assert (name in found) == few
        assert parameter.dtype is (torch.float32 if few else torch.bfloat16)
    assert len(set(found.values())) == 1
    with pytest.raises(ValueError, match="not 'heads'"):
        lora_fx.prepare_for_kbit_training(model, "heads")  # type: ignore[arg-type]


def test_packed_weights_stay_and_adapters_are_trained_through_them() -> None:
    model = nf4(short())
    packed = {n: p.dtype for n, p in model.named_parameters() if p.dtype is torch.uint8}
    assert packed
    found = lora_fx.prepare_for_kbit_training(model, "all")
    assert not packed.keys() & found.keys()
    assert {n: p.dtype for n, p in model.named_parameters() if n in packed} == packed
    text = "lora 1 adapter default { rank = 2 init = random target q_proj }"
    adapted: Any = lora_fx.compile(model, text, backend=None)
    want = model(tokens()).logits
    step(adapted, tokens(2, 7))
    assert all(p.grad.norm() > 0 for p in adapted.parameters() if p.requires_grad)
    with adapted.disable_adapter():
        assert relative(adapted(tokens()).logits, want) < 1e-6


def test_a_head_in_16_bits_wants_autocast() -> None:
    model = nf4(short())
    lora_fx.prepare_for_kbit_training(model, "norms")
    with pytest.raises(RuntimeError, match="dtype"):
        model(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens()).logits.isfinite().all()
    lora_fx.prepare_for_kbit_training(model)
    assert model(tokens()).logits.dtype is torch.float32
