"""Slots whose factors lie in one tensor compute what each adapter computes alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import lora_fx
from lora_fx import kernels
from lora_fx.adapters import storage
from lora_fx.rules import gather_samples
from tests.dense import relative
from tests.runtime.mixed import alone, mixed
from tests.tiny import llama, tokens

OWN = "lora 1 adapter a { rank = 4 alpha = 6 init = random target linear }"
SPEC = f"{OWN} route {{ slots = 4  max_rank = 5 }}"
RANKS = {"one": 2, "two": 5, "three": 3}
NAMES = ["two", "a", "__base__", "one", "two", "three"]
WAYS = ("masked", "gathered", "in_kernel")


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather_samples, "is_gathered", lambda *_: request.param == "gathered")
    in_kernel = request.param == "in_kernel"
    monkeypatch.setattr(kernels, "are_on", lambda *_: in_kernel)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    for name, rank in RANKS.items():
        more = f"alpha = {rank + 1} init = random target q_proj, down_proj"
        donor: Any = mixed(f"lora 1 adapter {name} {{ rank = {rank} {more} }}", None)
        donor.save_pretrained(tmp_path)
    return tmp_path


def served(disk: Path, backend: str | None = "eager") -> Any:
    model: Any = mixed(SPEC, backend)
    for name in RANKS:
        model.load_adapter(disk / name, name)
    return model


def is_shared(model: nn.Module) -> bool:
    """Whether what is written into a factor is in the stack, at every site."""
    found = [site for _, site in storage.sites(model)]
    assert found
    with torch.no_grad():
        for site in found:
            slots = site.lora_slots
            for i, slot in enumerate(slots.slots):
                for factor in (slot.A, slot.B):
                    factor.weight.add_(1)
                seen = (slots.A[i], slot.A.weight), (slots.B[i], slot.B.weight)
                if not all(torch.equal(*pair) for pair in seen):
                    return False
                for factor in (slot.A, slot.B):
                    factor.weight.sub_(1)
    return True


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@torch.no_grad()
def test_each_sample_is_as_it_is_alone(disk: Path, backend: str | None) -> None:
    model, ids = served(disk, backend), tokens(len(NAMES), 9)
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        want = alone(model, name, input_ids=ids[i : i + 1])[0]
        assert relative(got[i], want) < 1e-5, name
    other = model(input_ids=ids, adapter_names=["one", *NAMES[1:]]).logits
    assert torch.equal(other[2], got[2])
    assert relative(other[0], got[0]) > 1e-2


@torch.no_grad()
def test_a_mix_of_adapters_in_slots(disk: Path) -> None:
    spec = SPEC.replace("max_rank = 5", 'max_rank = 5  when "half" -> 0.5 * a')
    model: Any = mixed(spec, "eager")
    model.load_adapter(disk / "two", "two")
    ids = tokens(3, 9)
    plain: Any = mixed(spec, None)
    plain.load_adapter(disk / "two", "two")
    names = ["half", "two", "a"]
    got, want = (one(input_ids=ids, adapter_names=names).logits for one in (model, plain))
    assert relative(got, want) < 1e-5
    other = plain(input_ids=ids, adapter_names=["half", "a", "two"]).logits
    assert relative(got[1:], other[1:]) > 1e-2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_beside_one_that_trains(disk: Path, backend: str) -> None:
    """Whose gradients go through what is in slots further up."""
    spec = SPEC.replace("route {", "route { train = true ")
    models: list[Any] = [mixed(spec, backend).train(), mixed(spec, None).train()]
    ids, gradients = tokens(4, 9), []
    for one in models:
        one.load_adapter(disk / "two", "two")
        logits = one(input_ids=ids, adapter_names=["a", "two", "__base__", "a"]).logits
        logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    got, want = gradients
    assert got.keys() == want.keys()
    assert any(".a." in name for name in want)
    assert all(relative(got[name], gradient) < 2e-5 for name, gradient in want.items())
    assert not any(".two." in name for name in got)


@torch.no_grad()
def test_the_graph_has_two_inputs_for_all_slots(disk: Path) -> None:
    model, ids = served(disk), tokens(len(NAMES), 9)
    text = lora_fx.capture(model, input_ids=ids, adapter_names=NAMES).text("adapted")
    assert "q_proj.lora_slots.A" in text
    assert not any(f"lora_A.{name}." in text for name in RANKS)
    assert "lora_A.a.weight" in text


@torch.no_grad()
def test_factors_stay_in_the_stack(disk: Path) -> None:
    model, ids = served(disk), tokens(len(NAMES), 9)
    want = model(input_ids=ids, adapter_names=NAMES).logits
    assert is_shared(model)
    for other in (copy.deepcopy(model), model.double(), model.float()):
        assert is_shared(other)
        assert relative(other(input_ids=ids, adapter_names=NAMES).logits, want) < 1e-6
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert not any("lora_slots" in name for name in state)
    name = "model.layers.0.self_attn.q_proj.lora_B.two.weight"
    state[name] += 1
    model.load_state_dict(state, assign=True)
    assert is_shared(model)
    got = model(input_ids=ids, adapter_names=NAMES).logits
    assert relative(got[0], want[0]) > 1e-2
    assert torch.equal(got[1], want[1])


def test_the_state_can_be_written(disk: Path, tmp_path: Path) -> None:
    state = served(disk).state_dict()
    save_file(state, tmp_path / "all.safetensors")
    again = load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_slot_that_is_filled_before_the_backward_pass(disk: Path) -> None:
    """What the pass needs is gone: it does not take what came instead."""
    spec, ids = SPEC.replace("route {", "route { train = true "), tokens(2, 9)

    def gradient(between: bool) -> torch.Tensor:
        model: Any = mixed(spec, None).train()
        model.load_adapter(disk / "two", "two")
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=inputs, adapter_names=["two", "a"]).logits.square().sum()
        if between:
            model.load_adapter(disk / "one", "two")
        loss.backward()
        assert inputs.grad is not None
        return inputs.grad

    assert gradient(False).any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(True)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=101)).eval()


@torch.no_grad()
def test_of_conv1d(tmp_path: Path) -> None:
    more = "{ rank = 3 init = random target c_attn, c_proj }"
    donor: Any = lora_fx.compile(gpt2(), f"lora 1 adapter new {more}", backend=None).eval()
    for name, parameter in donor.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.2)
    donor.save_pretrained(tmp_path)
    spec = f"lora 1 adapter a {more} route {{ slots = 3 }}"
    model: Any = lora_fx.compile(gpt2(), spec, backend="eager").eval()
    model.load_adapter(tmp_path / "new", "new")
    ids = tokens(3, 9)
    got = model(input_ids=ids, adapter_names=["new", "a", "__base__"]).logits
    assert relative(got[0], donor(input_ids=ids[:1]).logits[0]) < 1e-5
    assert relative(got[2], donor(input_ids=ids[2:]).logits[0]) > 1e-2
    assert all("lora_slots" in site._modules for _, site in storage.sites(model))


def test_parameters_of_another_kind_lie_apart() -> None:
    """As FSDP2 puts them there."""

    class Sharded(torch.Tensor):
        pass

    model: Any = mixed(SPEC, None)
    sites: list[Any] = [site for _, site in storage.sites(model)]
    assert all(site.lora_mixed.stack is not None for site in sites)
    slot = sites[0].lora_slots.slots[0]
    slot.A.weight = nn.Parameter(slot.A.weight.data.as_subclass(Sharded), requires_grad=False)
    model.set_adapter("a")
    assert [site.lora_mixed.stack is None for site in sites] == [True] + [False] * (len(sites) - 1)


def test_slots_with_biases_lie_apart() -> None:
    spec = SPEC.replace("init = random", "init = random lora_bias = true")
    model = lora_fx.compile(llama(1), spec, backend=None)
    assert not any("lora_slots" in site._modules for _, site in storage.sites(model))
