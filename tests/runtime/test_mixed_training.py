"""Mixed batches train: each adapter as it would by its own samples alone, and absent ones not."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.dense import relative
from tests.runtime.mixed import SPEC, mixed, samples
from tests.tiny import checkpointing, llama, tokens

BACKENDS = [None, "eager", "inductor"]
TRAINED = ["a", "d", "a", "__base__", "c", "d"]


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The summed loss of each sample."""
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(ids), -1).sum(1)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of(name: str, adapter: str) -> bool:
    return adapter in name.split(".")


def one_by_one(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Gradients by the model's own means without names: one backward for each adapter."""
    model.zero_grad()
    for adapter in dict.fromkeys(TRAINED):
        chosen = [i for i, name in enumerate(TRAINED) if name == adapter]
        if adapter != "__base__":
            model.set_adapter(adapter)
            losses(model(input_ids=ids[chosen]).logits, ids[chosen]).sum().backward()
    return gradients(model)


def at_once(model: Any, ids: Tensor, names: list[str] = TRAINED) -> dict[str, Tensor]:
    model.zero_grad()
    losses(model(input_ids=ids, adapter_names=names).logits, ids).sum().backward()
    return gradients(model)


def assert_as_apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 2e-5, name
    for name in got.keys() - want.keys():
        assert of(name, "b")
        assert not got[name].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_separate_runs(backend: str | None) -> None:
    model, ids = mixed(backend=backend).train(), samples(len(TRAINED))
    got, want = at_once(model, ids), one_by_one(model, ids)
    assert {name for name in "abcd" if any(of(n, name) for n in want)} == {"a", "c", "d"}
    assert_as_apart(got, want)
    swapped = at_once(model, ids, ["d", "a", *TRAINED[2:]])
    assert any(relative(swapped[name], want[name]) > 1e-2 for name in want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_adapters_do_not_move(backend: str | None) -> None:
    """Neither by weight decay nor by AdamW's momentum, which they have from earlier steps."""
    model, ids = mixed(backend=backend).train(), samples(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    steps = [["a", "b", "__base__", "b"], ["a", "a", "d", "__base__"], ["half", "a", "a", "a"]]
    there = [{"a", "b"}, {"a", "d"}, {"a", "b"}]
    for names, present in zip(steps, there, strict=True):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        losses(model(input_ids=ids, adapter_names=names).logits, ids).mean().backward()
        optimizer.step()
        for adapter in "abcd":
            own = [(n, p) for n, p in model.named_parameters() if of(n, adapter)]
            moved = [not torch.equal(p, before[n]) for n, p in own]
            assert own
            assert all(moved) if adapter in present else not any(moved), adapter
            assert all((p.grad is not None) is (adapter in present) for _, p in own)


def test_what_one_of_several_batches_had_is_present() -> None:
    """Gradient accumulation; a call whose loss is thrown away; another loss over two calls."""
    model, ids = mixed(backend=None).train(), samples(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(*names: str) -> Tensor:
        return losses(model(input_ids=ids, adapter_names=names).logits, ids).mean()

    def present() -> set[str]:
        optimizer.step()
        own = {n: p for n, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        return {name for name in "abcd" if any(of(n, name) for n in own)}

    loss("a", "a").backward()
    loss("c", "__base__").backward()
    assert present() == {"a", "c"}
    loss("d", "d")
    loss("b", "b").backward()
    assert present() == {"b"}
    (loss("a", "a") + loss("d", "b")).backward()
    assert present() == {"a", "b", "d"}
    loss("c", "c").backward()  # a step that is left out, as a scaler of float16 does
    optimizer.zero_grad()
    loss("a", "b").backward()
    assert present() == {"a", "b"}
    model.set_adapter("d")
    losses(model(input_ids=ids).logits, ids).mean().backward()
    assert present() == {"d"}
    loss("b", "b").backward()
    losses(model(input_ids=ids).logits, ids).mean().backward()
    assert present() == {"b", "d"}


def moved_by(model: Any, step: Callable[[], object]) -> set[str]:
    """The adapters that something changes."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return {name for name in "abcd" if any(of(n, name) for n in moved)}


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_computes_the_gradients(by_name: bool) -> None:
    model, ids = mixed(backend=None).train(), samples(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    called = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(model(input_ids=ids, adapter_names=["a", "b"]).logits, ids).mean()
        loss.backward()
        called.append(loss)
        return loss

    def step() -> None:
        result = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert result is called[0]

    assert moved_by(model, step) == {"a", "b"}
    assert len(called) == 1


def test_gradients_that_are_cleared_between_forward_and_backward() -> None:
    """Of a step that was left out before, as a scaler of float16 does."""
    model, ids = mixed(backend=None).train(), samples(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def loss(*names: str) -> Tensor:
        return losses(model(input_ids=ids, adapter_names=names).logits, ids).mean()

    loss("a", "a").backward()
    of_b = loss("b", "b")
    optimizer.zero_grad()
    of_b.backward()
    assert moved_by(model, optimizer.step) == {"b"}
    optimizer.zero_grad()
    loss("a", "a").backward()
    both = loss("b", "b"), loss("a", "a")
    optimizer.zero_grad()
    (both[0] + both[1]).backward()
    assert moved_by(model, optimizer.step) == {"a", "b"}


def test_a_plain_step_after_a_mixed_batch_that_no_optimizer_saw() -> None:
    model, ids = mixed(SPEC.replace("train = true", ""), backend=None).eval(), samples(2)
    loss = losses(model(input_ids=ids, adapter_names=["a", "a"]).logits, ids).mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)
    model.train().set_adapter("b")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses(model(input_ids=ids).logits, ids).mean().backward()
    assert moved_by(model, optimizer.step) == {"b"}


@dataclass
class Answer:
    y: Tensor


class Answering(nn.Module):
    """Returns what torch knows no parts of."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        self.first, self.second, self.recomputes = nn.Linear(8, 7), nn.Linear(7, 4), recomputes

    def inner(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())

    def forward(self, x: Tensor) -> Answer:
        how = {"use_reentrant": False}
        return Answer(checkpoint(self.inner, x, **how) if self.recomputes else self.inner(x))


@pytest.mark.parametrize("recomputes", [False, True])
def test_results_that_are_objects(recomputes: bool) -> None:
    torch.manual_seed(0)
    adapters = " ".join(f"adapter {n} {{ rank = 2 init = random target linear }}" for n in "ab")
    text = f"lora 1 {adapters} route {{ train = true }}"
    model: Any = lora_fx.compile(Answering(recomputes), text, backend=None).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 8), adapter_names=["a", "a"]).y.square().sum().backward()
    assert moved_by(model, optimizer.step) == {"a"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs")  # of a forward without gradients
def test_adapters_that_are_switched_before_what_is_computed_again(reentrant: bool) -> None:
    model, ids = mixed(backend=None).train(), samples(2)
    checkpointing(model, reentrant)
    model.enable_input_require_grads()
    model.set_adapter("a")

    def loss() -> Tensor:
        return losses(model(input_ids=ids).logits, ids).mean()

    loss().backward()
    want = gradients(model)
    model.zero_grad()
    first = loss()
    with model.disable_adapter(), torch.no_grad():  # as preference training does
        loss()
    first.backward()
    got = gradients(model)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], one) for name, one in want.items())
    first = loss()
    model.set_adapter("b")
    with pytest.raises(LoraFxError, match="other adapters act"):
        first.backward()


def test_an_adapter_that_comes_later_is_absent_as_well(tmp_path: Path) -> None:
    model, ids = mixed(backend=None).train(), samples(2)

    def trained(*names: str) -> set[str]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.zero_grad()
        losses(model(input_ids=ids, adapter_names=list(names)).logits, ids).mean().backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        return {name for name in "abcdef" if any(of(n, name) for n in moved)}

    assert trained("a", "b") == {"a", "b"}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "a", "e", is_trainable=True)
    assert trained("a", "b") == {"a", "b"}
    assert trained("e", "__base__") == {"e"}
    model.delete_adapter("a")
    model.load_adapter(tmp_path / "b", "f", is_trainable=True)
    assert trained("f", "e") == {"e", "f"}


def test_steps_of_other_optimizers_take_nothing() -> None:
    """A critic's, another model's, and one optimizer for each adapter."""
    model, ids = mixed(backend=None).train(), samples(2)
    own = {
        name: [p for n, p in model.named_parameters() if of(n, name) and p.requires_grad]
        for name in "abcd"
    }
    optimizers = {name: torch.optim.SGD(some, lr=0.1) for name, some in own.items()}
    critic = torch.nn.Linear(2, 3)
    other = torch.optim.SGD(critic.parameters(), lr=0.1)

    def backward(name: str) -> None:
        losses(model(input_ids=ids, adapter_names=[name] * 2).logits, ids).mean().backward()

    backward("a")
    critic(torch.ones(2)).sum().backward()
    other.step()
    backward("b")
    before = {name: [p.detach().clone() for p in some] for name, some in own.items()}
    for optimizer in optimizers.values():
        optimizer.step()
    moved = {name for name, some in own.items() if not all(map(torch.equal, some, before[name]))}
    assert moved == {"a", "b"}
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    backward("c")
    assert {n for n, o in optimizers.items() if (o.step(), own[n][0].grad is not None)[1]} == {"c"}


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_are_set_to_zero(set_to_none: bool) -> None:
    """Of optimizers of each adapter's own: what was trained before stays where it is."""
    model, ids = mixed(backend=None).train(), samples(2)
    own = {
        name: [p for n, p in model.named_parameters() if of(n, name) and p.requires_grad]
        for name in "ab"
    }
    optimizers = [torch.optim.AdamW(some, lr=0.1, weight_decay=0.3) for some in own.values()]

    def moved(*names: str) -> set[str]:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        for name in names:  # one after the other, as gradients are accumulated
            logits = model(input_ids=ids, adapter_names=[name] * 2).logits
            losses(logits, ids).mean().backward()
        before = {name: [p.detach().clone() for p in some] for name, some in own.items()}
        for optimizer in optimizers:
            optimizer.step()
        return {n for n, some in own.items() if not all(map(torch.equal, some, before[n]))}

    for names in ("a", "b", "ab", "a", "ba", "b"):
        assert moved(*names) == set(names)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_an_adapter_whose_factors_step_at_different_times(set_to_none: bool) -> None:
    model, ids = mixed(backend=None).train(), samples(2)
    own = {n: p for n, p in model.named_parameters() if of(n, "a") and p.requires_grad}
    often, seldom = (
        torch.optim.SGD([p for n, p in own.items() if factor in n], lr=0.1)
        for factor in ("lora_A", "lora_B")
    )
    for name in ("a", "b"):
        logits = model(input_ids=ids, adapter_names=[name] * 2).logits
        losses(logits, ids).mean().backward()
        often.step()
        often.zero_grad(set_to_none=set_to_none)
    assert moved_by(model, seldom.step) == {"a"}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_computed_again_is_routed_as_before(backend: str | None, reentrant: bool) -> None:
    model, ids = mixed(backend=backend).train(), samples(len(TRAINED))
    want = one_by_one(model, ids)
    checkpointing(model, reentrant)
    model.enable_input_require_grads()
    model.zero_grad()
    loss = losses(model(input_ids=ids, adapter_names=TRAINED).logits, ids).sum()
    with torch.no_grad():  # other routings, and none
        model.eval()(input_ids=ids, adapter_names=["b"] * len(ids))
        model(input_ids=ids)
    model.train()
    model.lora_fx_routing.shares = torch.zeros(len(ids), 4)  # what was before
    loss.backward()
    assert_as_apart(gradients(model), want)


class Recomputing(nn.Module):
    """Checkpoints by itself what lies between its ends."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.down(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))

    def middle(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up(torch.tanh(x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_by_itself(reentrant: bool) -> None:
    """It is called again once the call has ended, and nothing is left of that afterwards."""
    text = """lora 1 route { train = true }
    adapter a { rank = 2 init = random target linear }
    adapter b { rank = 3 init = random target linear }"""
    model = lora_fx.compile(Recomputing(reentrant), text, backend=None).train()
    x, rows = torch.randn(3, 4, 5), ["a", "__base__", "b"]
    weights = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)

    def own(name: str) -> dict[str, Tensor]:
        keys = (n for n, p in model.named_parameters() if f".{name}." in n and p.requires_grad)
        return {key: model.get_parameter(key).grad.clone() for key in keys}

    want = {}
    for index, name in ((0, "a"), (2, "b")):
        model.zero_grad()
        model.set_adapter(name)
        (model(x[index : index + 1]).square() * weights[index]).sum().backward()
        want |= own(name)
    model.zero_grad()
    (model(x, adapter_names=rows).square() * weights).sum().backward()
    assert_as_apart(own("a") | own("b"), want)
    assert model.lora_fx_routing.shares is None


def test_a_backward_pass_that_fails_leaves_no_routing() -> None:
    text = "lora 1 route { train = true } adapter a { rank = 2 init = random target linear }"
    model = lora_fx.compile(Recomputing(True), text, backend=None).train()
    x = torch.randn(2, 4, 5)
    want = model(x).detach()
    output = model(x, adapter_names=["a", "__base__"])
    model.up.lora_A["a"].weight.register_hook(_fail)
    with pytest.raises(RuntimeError, match="as it was asked to"):
        output.sum().backward()
    assert torch.equal(model(x), want)


def _fail(_: Tensor) -> None:
    raise RuntimeError("as it was asked to")


@pytest.mark.parametrize("how", ["layers", "budget(0.3)"])
def test_the_specs_own_checkpointing(how: str) -> None:
    ids = samples(len(TRAINED))
    model = mixed(f"{SPEC}\ncompile {{ checkpoint = {how} }}").train()
    want = one_by_one(mixed(backend=None).train(), ids)
    model.zero_grad()
    loss = losses(model(input_ids=ids, adapter_names=TRAINED).logits, ids).sum()
    model.lora_fx_routing.shares = torch.zeros(len(ids), 4)  # what was before
    loss.backward()
    assert_as_apart(gradients(model), want)


def test_a_whole_model_that_recomputes_in_its_graph() -> None:
    ids = samples(len(TRAINED))
    model = mixed(f"{SPEC}\ncompile {{ unit = model }}", backend="eager").train()
    want = one_by_one(mixed(backend=None).train(), ids)
    checkpointing(model, False)
    assert_as_apart(at_once(model, ids), want)


def test_a_model_that_recomputed_before_it_was_compiled() -> None:
    ids = samples(len(TRAINED))
    base = llama(2)
    checkpointing(base, False)
    model = lora_fx.compile(base, SPEC, backend=None)
    model.load_state_dict(mixed(backend=None).state_dict())
    want = one_by_one(mixed(backend=None).train(), ids)
    got = at_once(model.train(), ids)
    assert_as_apart(got, want)


def test_dropout_is_drawn_for_each_branch() -> None:
    spec = """lora 1
adapter a { rank = 4 dropout = 0.5 init = random target q_proj }
adapter b { rank = 3 init = random target up_proj }
route { train = true }"""
    model, ids = mixed(spec).train(), samples(3)
    names = ["a", "b", "__base__"]
    first, second = (model(input_ids=ids, adapter_names=names).logits for _ in range(2))
    assert relative(first[1:], second[1:]) < 1e-6
    assert relative(first[0], second[0]) > 1e-3
    model.eval()
    first, second = (model(input_ids=ids, adapter_names=names).logits for _ in range(2))
    assert torch.equal(first, second)


def test_training_is_refused_unless_the_spec_says_so() -> None:
    model, ids = mixed(SPEC.replace("train = true", ""), backend=None).train(), tokens(2, 5)
    with pytest.raises(LoraFxError, match="train = true"):
        model(input_ids=ids, adapter_names=["a", "b"])
    assert model.eval()(input_ids=ids, adapter_names=["a", "b"]).logits.isfinite().all()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = mixed(backend=None).train(), tokens(2, 5)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(LoraFxError, match="in 2 processes"):
        model(input_ids=ids, adapter_names=["a", "b"])
