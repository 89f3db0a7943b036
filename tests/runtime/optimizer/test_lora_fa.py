"""LoRA-FA: A stays, B takes the steps of PEFT's `create_lorafa_optimizer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa
from torch import nn
from torch.optim import Optimizer

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.runtime.optimizer.lora_fa import pairs
from tests.dense import relative
from tests.runtime.optimizer.stepped import ours, stepped, theirs
from tests.runtime.trainer import base, loss, trainer
from tests.tiny import assert_equal, llama, tokens

ADAPTER = """lora 1
adapter default { rank = 3 alpha = 5 init = random target q_proj, up_proj }
"""
SPEC = ADAPTER + "optimizer { name = lora_fa lr = 2e-3 eps = 1e-12 }"


@pytest.fixture(autouse=True)
def _no_bfloat16_in_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)


def by_peft(model: nn.Module) -> Optimizer:
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=2e-3)
    for group in optimizer.param_groups:
        group["eps"] = 1e-12
    return optimizer


def test_steps_are_those_of_peft() -> None:
    want = {n: c for n, c in stepped(theirs(SPEC), by_peft).items() if "lora_B" in n}
    got = stepped(ours(SPEC), lora_fx.optimizer)
    assert_equal(got, want, 1e-4)
    plain = stepped(ours(SPEC.replace("lora_fa", "adamw")), lora_fx.optimizer)
    assert all(relative(plain[name], want[name]) > 0.01 for name in want)


def test_what_b_sees_is_the_weights_gradient_in_the_span_of_a() -> None:
    dense = llama(2).double()
    weight = dense.model.layers[1].self_attn.q_proj.weight
    text = SPEC.replace("rank = 3", "rank = 3 dtype = float32").replace("random", "default")
    model = lora_fx.compile(llama(2), text, backend=None)
    for one in (dense, model):
        one(input_ids=tokens(), labels=tokens()).loss.backward()
    (pair,) = (p for p in pairs(model) if p.site is model.model.layers[1].self_attn.q_proj)
    branch = pair.site.lora_branches["default"]
    A = branch.A.weight.double()
    gradient, wanted = pair.gradient(), weight.grad
    assert gradient is not None
    assert wanted is not None
    projected = wanted @ torch.linalg.pinv(A) @ A
    assert relative(5 / 3 * gradient.double() @ A, projected) < 1e-5
    assert relative(projected, wanted) > 0.1
    assert pair.B.grad is not None
    assert relative(gradient, pair.B.grad) > 0.1


def test_a_is_not_trained_and_counts_for_nothing() -> None:
    model = ours(SPEC)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.lora_fx_plan.trainable == trained == 2 * 3 * (32 + 44)


def test_an_adapter_loaded_to_be_trained_keeps_its_a_too(tmp_path: Path) -> None:
    ours(ADAPTER).save_pretrained(tmp_path)
    model = ours(SPEC)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".second." in n}
    assert len(trained) == 4
    assert all("lora_B" in name for name in trained)


def test_gradients_stay_what_autograd_wrote_and_closures_run() -> None:
    model = ours(SPEC)
    optimizer = lora_fx.optimizer(model)
    seen: list[torch.Tensor] = []
    (first, *_) = (p for n, p in model.named_parameters() if "lora_B" in n)

    def closure() -> float:
        optimizer.zero_grad()
        value = model(input_ids=tokens(), labels=tokens()).loss
        value.backward()
        assert first.grad is not None
        seen.append(first.grad.clone())
        return value.item()

    before = first.detach().clone()
    assert optimizer.step(closure) is not None
    assert first.grad is not None
    assert torch.equal(first.grad, seen[0])
    assert not torch.equal(first, before)


def test_it_goes_on_without_an_adapter_that_has_been_deleted() -> None:
    model: Any = ours(SPEC + ADAPTER.replace("lora 1", "").replace("default", "second"))
    optimizer = lora_fx.optimizer(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    model.delete_adapter("second")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    optimizer.step()
    assert before
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in before.items())


def test_hooks_of_a_step_run_once() -> None:
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch wraps its class then
    model = ours(SPEC)
    optimizer, seen = lora_fx.optimizer(model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert seen == ["before", "after"]


def test_it_goes_on_where_it_was_saved() -> None:
    whole, first = ours(SPEC), ours(SPEC)
    a, b = lora_fx.optimizer(whole), lora_fx.optimizer(first)
    for model, optimizer in ((whole, a), (first, b)):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    second = ours(SPEC)
    second.load_state_dict(first.state_dict())
    c = lora_fx.optimizer(second)
    c.load_state_dict(b.state_dict())
    for model, optimizer in ((whole, a), (second, c)):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    for (name, x), y in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("adapter", "message"),
    [("variant = dora", "variant `dora`"), ("init = mica", "init `mica`")],
)
def test_what_has_another_gradient_is_refused(adapter: str, message: str) -> None:
    text = (
        f"lora 1 adapter a {{ {adapter} target q_proj }} optimizer {{ name = lora_fa lr = 1e-3 }}"
    )
    with pytest.raises(LoraFxError, match=message) as found:
        lora_fx.compile(llama(2), text, backend=None)
    (fault,) = found.value.diagnostics
    assert fault.span is not None


def test_trainer_takes_it(tmp_path: Path) -> None:
    text = """lora 1 adapter a { rank = 3 alpha = 5 target linear }
    optimizer { name = lora_fa lr = 2e-2 }"""
    model = lora_fx.compile(base(), text, backend="eager")
    run = trainer(model, tmp_path, max_steps=12)
    run.optimizer = lora_fx.optimizer(model)
    first = loss(run)
    run.train()
    assert loss(run) < 0.9 * first
