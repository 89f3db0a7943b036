"""Adapters of every kind: deleted, copied, moved, pickled, saved by name."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import scatter
from tests.adapters.varied import IDS, KINDS, assert_same, compiled, step
from tests.dense import relative
from tests.odd_models import Varied


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(IDS)


KIND = pytest.mark.parametrize("kind", KINDS)


def eager(kind: str) -> nn.Module:
    return compiled(KINDS[kind], "eager").eval()


def marked(kind: str) -> nn.Module:
    return compiled(KINDS[kind], None).eval()


@KIND
def test_deleted(kind: str) -> None:
    """Nothing of it is left, and every parameter of the base is the one it was."""
    base = Varied().eval().requires_grad_(False)
    model = compiled(KINDS[kind], None, base)
    model.delete_adapter("default")
    assert torch.equal(output(model), output(base))
    assert {n: p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n}.keys() == {
        n for n, _ in base.named_parameters()
    }
    assert not any(p.requires_grad for p in model.parameters())
    assert not [n for n, _ in model.named_parameters() if ".default" in n]


@KIND
def test_training_leaves_the_base_as_it_is(kind: str) -> None:
    """Bit for bit, though each step moves the output."""
    base = Varied().eval().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = compiled(KINDS[kind], None, base)
    start = output(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        step(model)
        optimizer.step()
    assert relative(output(model), start) > 1e-3
    assert base.state_dict().keys() == before.keys()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with model.disable_adapter():
        assert torch.equal(output(model), output(base))


@KIND
def test_a_deep_copy_is_private(kind: str) -> None:
    model = eager(kind)
    before = step(model)
    twin = copy.deepcopy(model)
    assert_same(step(twin), before)
    own = {id(t) for t in live_tensors(model, "default").values() if t.is_leaf}
    assert own.isdisjoint({id(t) for t in live_tensors(twin, "default").values()})
    scatter(twin)
    assert relative(step(twin)["output"], before["output"]) > 1e-3
    assert_same(step(model), before)


@KIND
def test_pickled(kind: str) -> None:
    model = eager(kind)
    before = step(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(model)
    assert_same(step(twin), before)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(output(twin), output(model))


@KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moved_to_another_dtype(kind: str, dtype: torch.dtype) -> None:
    """All parameters of it, ties stay ties, and the way back is the way there."""
    model = marked(kind)
    before = step(model)
    model.to(dtype)
    assert {t.dtype for t in live_tensors(model, "default").values() if t.ndim} == {dtype}
    assert model.head.weight is model.embed.weight or "train" in kind
    after = step(model)
    assert {t.dtype for t in after.values()} == {dtype}
    assert relative(after["output"], before["output"]) < 0.05
    with model.disable_adapter():
        assert relative(output(model), output(Varied().eval().to(dtype))) < 1e-6


@KIND
def test_moved_to_meta_and_back(kind: str) -> None:
    """What is in force stays that of the adapter, though torch replaces every parameter."""
    model, reference = marked(kind), marked(kind)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to_empty(device="meta")
    assert model(IDS.to("meta")).shape == (3, 4, 11)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert_same(step(model), step(reference))
    with model.disable_adapter():
        assert relative(output(model), output(Varied().eval())) < 1e-6


@KIND
def test_state_dict_round_trip(kind: str) -> None:
    model, twin = eager(kind), eager(kind)
    scatter(twin)
    want = step(model)
    assert relative(step(twin)["output"], want["output"]) > 1e-3
    twin.load_state_dict(model.state_dict())
    assert_same(step(twin), want)


def test_conflicts_are_refused() -> None:
    text = """lora 1
    adapter one { rank = 2 target up train norm tokens [3, 5] in embed }
    adapter two { rank = 2 target up train norm }
    adapter three { rank = 2 target mix tokens [5] in embed }
    adapter four { rank = 2 bias = all target mix }
    adapter five { rank = 2 bias = lora_only target mix }"""
    model = lora_fx.compile(Varied(), text, backend=None).eval()
    before = output(model)
    for pair, message in (
        (["one", "two"], r"`one` and `two` both train `norm\.weight`"),
        (["three", "one"], r"`three` and `one` both train row 5 of `embed`"),
        (["four", "five"], r"`four` and `five` both train `mix\.bias`"),
        (["two", "four"], r"`two` and `four` both train `norm\.bias`"),
    ):
        with pytest.raises(lora_fx.LoraFxError, match=message):
            model.set_adapter(pair)
        assert model.active_adapters() == ["one"]
        assert torch.equal(output(model), before)
    model.set_adapter(["three", "five", "two"])
    model(IDS)
