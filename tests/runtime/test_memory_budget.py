"""`checkpoint = budget(share)`: what the compiled layers keep, measured, and the same gradients."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.graph import backends
from tests.tiny import assert_differ, assert_equal, checkpointing, llama, spec, tokens

SHARES = (1.0, 0.6, 0.3, 0.0)
DEPTH, SAMPLES, LENGTH = 3, 3, 29


def compiled(checkpoint: str, dropout: float = 0.0, attention: float = 0.0) -> nn.Module:
    adapter = f"rank = 4 alpha = 6 dropout = {dropout}"
    text = spec(adapter=adapter).replace("unit", f"checkpoint = {checkpoint} unit")
    return lora_fx.compile(llama(DEPTH, attention_dropout=attention), text).train()


def bytes_kept(model: nn.Module, result: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps for a result, the model's own aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    seen, ahead = set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for tensor in getattr(node, "saved_tensors", ()):  # of compiled functions
            if tensor is not None:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
        ahead += [before for before, _ in node.next_functions]
    return sum(size for place, size in kept.items() if place not in own)


@cache
def measured(
    checkpoint: str, dropout: float = 0.0, attention: float = 0.0
) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept for the logits, and gradients; what is drawn is drawn by one seed."""
    model, ids = compiled(checkpoint, dropout, attention), tokens(SAMPLES, LENGTH)
    torch.manual_seed(7)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    kept = bytes_kept(model, hidden)
    hidden.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return kept, grads


@pytest.mark.parametrize("dropouts", [(), (0.3,), pytest.param((0.3, 0.2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", SHARES)
def test_gradients_are_those_without_a_budget(share: float, dropouts: tuple[float, ...]) -> None:
    _, want = measured("none", *dropouts)
    _, got = measured(f"budget({share})", *dropouts)
    assert_equal(got, want, 1e-5)


def test_dropout_matters() -> None:
    """Negative control: another draw gives other gradients."""
    a, b, c = (measured("none", *dropouts)[1] for dropouts in ((), (0.3,), (0.3, 0.2)))
    assert_differ(a.values(), b.values())
    assert_differ(b.values(), c.values())


def test_without_its_seeds_dropout_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: torch by itself draws anew in the backward pass."""
    monkeypatch.setattr("lora_fx.graph.keep_random._draws", lambda node: False)
    monkeypatch.setattr("lora_fx.graph.keep_random.KeepRandom.uuid", lambda self: b"nothing")
    _, wrong = measured.__wrapped__("budget(0)", 0.3)
    assert_differ(wrong.values(), measured("none", 0.3)[1].values())


@pytest.mark.parametrize("dropouts", [(), (0.3,), pytest.param((0.3, 0.2), marks=pytest.mark.slow)])
def test_less_is_kept_the_smaller_the_share(dropouts: tuple[float, ...]) -> None:
    kept = [measured(f"budget({share})", *dropouts)[0] for share in SHARES]
    assert kept[0] == measured("none", *dropouts)[0]
    assert all(less < more for more, less in pairwise(kept))
    inputs = DEPTH * SAMPLES * LENGTH * 32 * 4
    least = kept[-1]
    assert inputs <= least < 1.5 * inputs
    for share, bytes in zip(SHARES, kept, strict=True):
        assert bytes < 1.15 * (least + share * (kept[0] - least))


def test_the_plan_says_as_much() -> None:
    """The estimate is of uncompiled layers, which keep more, and of one layer computed again."""
    for share in SHARES:
        text = spec().replace("unit", f"checkpoint = budget({share}) unit")
        plan = lora_fx.plan(text, llama(DEPTH))
        none = lora_fx.plan(spec(), llama(DEPTH))
        saved = none.activations(SAMPLES, LENGTH).bytes - plan.activations(SAMPLES, LENGTH).bytes
        really = measured("none")[0] - measured(f"budget({share})")[0]
        assert saved == pytest.approx(really, rel=0.5, abs=1)


def test_inference_is_not_touched() -> None:
    model, other = compiled("budget(0.3)").eval(), compiled("none").eval()
    with torch.no_grad():
        got, want = model(tokens()).logits, other(tokens()).logits
    assert torch.equal(got, want)


def test_a_budget_is_in_force_whatever_trainer_asks() -> None:
    model = compiled("budget(0.3)")
    with pytest.warns(UserWarning, match="`checkpoint = budget` in the spec is in force already"):
        checkpointing(model, reentrant=False)
    assert not model.lora_fx_recomputes


@pytest.mark.parametrize("backend", ["eager", None])
def test_other_backends_refuse(backend: str | None) -> None:
    text = spec().replace("unit", "checkpoint = budget(0.3) unit")
    with pytest.raises(lora_fx.LoraFxError) as error:
        lora_fx.compile(llama(2), text, backend=backend)
    assert [d.code for d in error.value.diagnostics] == ["budget-needs-inductor"]


def test_all_faults_at_once() -> None:
    text = "lora 1 adapter x { rank = 2 target linear } compile { checkpoint = budget(0.3) }"
    with pytest.raises(lora_fx.LoraFxError) as error:
        lora_fx.compile(nn.Sequential(nn.Linear(5, 7)), text, backend=None)
    assert [d.code for d in error.value.diagnostics] == ["no-layers", "budget-needs-inductor"]


def test_the_setting_is_as_before_afterwards() -> None:
    import torch._functorch.config as config

    assert config.activation_memory_budget == 1
    seen = []

    def function(a: Tensor) -> Tensor:
        return (a @ a).tanh()

    def backend(graph, inputs):
        run = backends.inductor(graph, inputs, "default", budget=0.5)
        seen.append(config.activation_memory_budget)
        return run

    torch.compile(function, backend=backend)(torch.randn(3, 3, requires_grad=True))
    assert seen == [1]
