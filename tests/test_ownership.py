"""The ownership table: who owns which tensor, and what each operation does to it."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.dense import relative
from tests.quantised import nf4
from tests.tiny import assert_differ, llama, spec, step, tokens

REPLICATED = "layers { replicate 0..3, 1..4 }"


def state(model: nn.Module) -> dict[str, tuple]:
    """Everything about a model's tensors that a user could see change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        n: (t.data_ptr(), t.dtype, t.requires_grad, t.grad is None, t.detach().clone(), id(t))
        for n, t in tensors
    } | {f"{n}.training": (m.training, type(m)) for n, m in model.named_modules()}


def assert_unchanged(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, old in before.items():
        for a, b in zip(old, after[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


@pytest.mark.parametrize("more", ["", REPLICATED])
def test_the_given_model_is_unchanged(more: str) -> None:
    base = llama(4, tie_word_embeddings=True)
    base.model.layers[1].eval()
    config = base.config.to_dict()
    before = state(base)
    model = lora_fx.compile(base, spec(more=more), backend="eager")
    step(model, tokens())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.to(torch.bfloat16).eval()
    with torch.no_grad():
        model.model.norm.weight.requires_grad_(False).mul_(1.0)
    assert_unchanged(before, state(base))
    assert base.config.to_dict() == config


def test_modes_are_those_given() -> None:
    base = llama()
    assert lora_fx.compile(base.eval(), spec(), backend=None).training is False
    assert lora_fx.compile(base.train(), spec(), backend=None).training is True


def test_base_weights_share_storage_and_are_frozen() -> None:
    base = llama()
    model = lora_fx.compile(base, spec(), backend=None)
    own = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert own[name].data_ptr() == parameter.data_ptr()
        assert own[name] is not parameter
        assert not own[name].requires_grad
        assert parameter.requires_grad


def test_buffers_are_copied() -> None:
    base = llama()
    model = lora_fx.compile(base, spec(), backend=None)
    for name, buffer in base.named_buffers():
        assert model.get_buffer(name).data_ptr() != buffer.data_ptr()


def test_ties_stay_ties() -> None:
    base = llama(tie_word_embeddings=True)
    model = lora_fx.compile(base, spec(), backend=None)
    for twin in (model, copy.deepcopy(model), model.to(torch.float64)):
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_replicas_share_one_weight_and_own_their_adapters() -> None:
    model = lora_fx.compile(llama(4), spec(more=REPLICATED), backend=None)
    a, b = (model.model.layers[i].self_attn.q_proj for i in (1, 3))
    for twin in (model, copy.deepcopy(model), model.to(torch.float64)):
        a, b = (twin.model.layers[i].self_attn.q_proj for i in (1, 3))
        assert a.weight is b.weight
        assert a.lora_A["default"].weight is not b.lora_A["default"].weight
    assert relative(a.lora_A["default"].weight, b.lora_A["default"].weight) > 0.1


def test_two_specs_on_one_base() -> None:
    base = llama()
    alone = step(lora_fx.compile(llama(), spec(), backend="eager"), tokens())
    first = lora_fx.compile(base, spec(), backend="eager")
    second = lora_fx.compile(base, spec(adapter="rank = 4 alpha = 6 seed = 7"), backend="eager")
    other = step(second, tokens())
    torch.optim.SGD(second.parameters(), lr=1.0).step()
    got = step(first, tokens())
    assert all(torch.equal(got[n], alone[n]) for n in alone)
    assert_differ(got.values(), other.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_moves_everything_but_the_scalings(dtype: torch.dtype) -> None:
    model = lora_fx.compile(llama(), spec(adapter="alpha = 1 rank = 3"), backend="eager").to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    scalings = model.model.layers[0].self_attn.q_proj.lora_scalings
    assert scalings.dtype is torch.float32
    assert scalings.item() == torch.tensor(1 / 3, dtype=torch.float32).item()
    assert model(input_ids=tokens()).logits.dtype is dtype


def test_a_deep_copy_is_private() -> None:
    model = lora_fx.compile(llama(), spec(), backend="eager")
    before = step(model, tokens())
    twin = copy.deepcopy(model)
    assert all(torch.equal(t, before[n]) for n, t in step(twin, tokens()).items())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert_differ(step(twin, tokens()).values(), before.values())
    assert all(torch.equal(t, before[n]) for n, t in step(model, tokens()).items())


def test_torch_save_and_load() -> None:
    model = lora_fx.compile(llama(), spec(), backend="eager")
    before = step(model, tokens())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(model)
    assert all(torch.equal(t, before[n]) for n, t in step(twin, tokens()).items())


def test_state_dict_round_trip() -> None:
    model = lora_fx.compile(llama(), spec(), backend="eager")
    twin = lora_fx.compile(llama(), spec(adapter="rank = 4 alpha = 6 seed = 7"), backend="eager")
    assert_differ([step(model, tokens())["loss"]], [step(twin, tokens())["loss"] * 1.1])
    twin.load_state_dict(model.state_dict())
    want = step(model, tokens())
    assert all(torch.equal(t, want[n]) for n, t in step(twin, tokens()).items())


def test_inplace_adapts_the_given_tree() -> None:
    base = llama()
    assert lora_fx.compile(base, spec(), backend=None, inplace=True) is base
    assert not base.model.norm.weight.requires_grad


def test_a_4bit_base_is_shared_and_stays_as_it_was() -> None:
    base = nf4(llama())
    weight = base.model.layers[0].self_attn.q_proj.weight
    packed, state = weight.detach().clone(), weight.quant_state
    model = lora_fx.compile(base, spec(), backend="eager")
    own = model.model.layers[0].self_attn.q_proj
    assert own.weight.data_ptr() == weight.data_ptr()
    assert own.weight.module is own
    assert weight.module is base.model.layers[0].self_attn.q_proj
    step(model, tokens())
    model.eval()(tokens())
    assert weight.quant_state is state
    assert torch.equal(weight, packed)
