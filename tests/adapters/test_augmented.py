"""Room beside weights: who gets it, and what it survives."""

import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.graph.room import ROOM, has_room
from tests.tiny import llama, step, tokens

TEXT = """lora 1
adapter default { rank = 3 init = random target linear }
compile { layout = augmented }"""


def adapted(**settings) -> nn.Module:
    return lora_fx.compile(llama(**settings), TEXT)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.model.layers.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    }


def test_every_adapted_weight_has_room() -> None:
    model = adapted()
    assert len(linears(model)) == 14
    assert all(has_room(linear.weight) for linear in linears(model).values())
    assert not has_room(model.lm_head.weight)  # not adapted
    assert not any(has_room(p) for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: m.to(torch.bfloat16), copy.deepcopy],
    ids=["double", "bfloat16", "deepcopy"],
)
def test_room_is_made_again(change) -> None:
    model = adapted()
    want = {name: linear.weight.clone() for name, linear in linears(model).items()}
    changed = change(model)
    for name, linear in linears(changed).items():
        assert has_room(linear.weight)
        assert torch.equal(linear.weight.float(), want[name].to(linear.weight.dtype).float())
    parameters = dict(changed.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()


def test_a_copy_has_weights_of_its_own() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    for name, linear in linears(twin).items():
        assert linear.weight.data_ptr() != linears(model)[name].weight.data_ptr()


def test_shared_weights_stay_shared() -> None:
    model = adapted(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not has_room(model.lm_head.weight)
    assert all(has_room(linear.weight) for linear in linears(model).values())


def test_loading_values_keeps_the_room() -> None:
    model = adapted()
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    values = {n: p for n, p in other.state_dict().items() if "proj" in n}
    model.load_state_dict(values, strict=False)
    assert all(has_room(linear.weight) for linear in linears(model).values())
    name, linear = next(iter(linears(model).items()))
    assert torch.equal(linear.weight, other.model.layers.get_submodule(name).weight)


def test_what_is_given_in_its_place_is_an_ordinary_weight() -> None:
    model = adapted()
    plain = lora_fx.compile(llama(), TEXT.replace("augmented", "plain"), backend=None)
    model.load_state_dict(plain.state_dict(), assign=True)
    assert not any(has_room(linear.weight) for linear in linears(model).values())
    got, want = step(model, tokens()), step(plain, tokens())
    assert torch.allclose(got["loss"], want["loss"], atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", None])
def test_what_no_kernel_would_use_is_not_made(backend: str | None) -> None:
    model = lora_fx.compile(llama(), TEXT, backend=backend)
    assert not any(has_room(linear.weight) for linear in linears(model).values())


def test_the_room_is_as_wide_as_it_says() -> None:
    weight = linears(adapted())["0.self_attn.q_proj"].weight
    assert weight.untyped_storage().nbytes() == 4 * weight.shape[0] * (weight.shape[1] + ROOM)


def test_room_beside_merged_weights_and_afterwards() -> None:
    model, marked = adapted(), lora_fx.compile(llama(), TEXT, backend=None)
    weights = {name: linear.weight for name, linear in linears(model).items()}
    for one in (model, marked):
        one.merge_adapter()
    assert all(has_room(linear.weight) for linear in linears(model).values())
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight, linears(marked)[name].weight)
        assert not torch.equal(linear.weight, weights[name])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one.unmerge_adapter()
        assert all(has_room(linear.weight) for linear in linears(one).values())
    assert all(linear.weight is weights[name] for name, linear in linears(model).items())
    for name, linear in linears(twin).items():
        assert torch.equal(linear.weight, weights[name])
    plain = model.merge_and_unload()
    assert all(linear.weight.is_contiguous() for linear in linears(plain).values())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in plain.parameters())
