"""Mixed batches whose samples' factors are picked in kernels; here in the plain references."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import lora_fx
from lora_fx import kernels
from tests.dense import relative
from tests.runtime.mixed import NAMES, SPEC, alone, mixed, samples
from tests.runtime.test_mixed_batch import dense
from tests.tiny import tokens

ROWS = """lora 1
adapter a { rank = 4 alpha = 6 init = random target linear }
adapter b { rank = 3 init = random target linear }
route { }
"""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda *_: True)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_each_sample_is_as_it_is_alone(backend: str) -> None:
    model, ids = mixed(backend=backend), samples()
    text = lora_fx.capture(model, input_ids=ids, adapter_names=NAMES).text("fused")
    assert "picked_expand" in text
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        if name not in ("half", "dora"):
            want = alone(model, name, input_ids=ids[i : i + 1])[0]
            assert relative(got[i], want) < 1e-5, name
    of_mixes = {3: {"a": 0.5, "b": -0.25}, 6: {"d": 0.4, "a": 1.0}}
    for i, shares in of_mixes.items():
        assert relative(got[i], dense(model, shares, ids[i : i + 1])[0]) < 1e-5
    other = [*NAMES[1:], NAMES[0]]
    before = counters["stats"]["unique_graphs"]
    assert relative(model(input_ids=ids, adapter_names=other).logits, got) > 1e-2
    assert counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_samples_of_the_base_are_the_base_bit_for_bit() -> None:
    model, ids = mixed(backend="eager"), samples()
    some = [name if i % 2 else "__base__" for i, name in enumerate(NAMES)]
    got = model(input_ids=ids, adapter_names=some).logits
    base = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    assert torch.equal(got[::2], base[::2])
    assert not torch.equal(got[1::2], base[1::2])


@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_samples() -> None:
    model, ids = mixed(ROWS, "eager"), tokens(4, 5)
    names = ["a", "b", "__base__", "b"]
    want = model(input_ids=ids, adapter_names=names).logits
    for name, parameter in model.named_parameters():
        if ".a." in name:
            parameter.fill_(float("nan"))
    got = model(input_ids=ids, adapter_names=names).logits
    assert torch.equal(got[1:], want[1:])
    assert got[0].isnan().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_tokens_are_those_of_single_runs(cache: str) -> None:
    model: Any = mixed(ROWS, "eager")
    ids, names = tokens(4, 6), ["b", "a", "__base__", "a"]
    how = {"max_new_tokens": 5, "do_sample": False}
    more = {"cache_implementation": "static"} if cache == "static" else {}
    got = model.generate(ids, adapter_names=names, **how, **more)
    for i, name in enumerate(names):
        single = copy.deepcopy(model)
        want = single.generate(ids[i : i + 1], adapter_names=[name], **how)
        assert torch.equal(got[i], want[0]), name
    other = model.generate(ids, adapter_names=["a", "b", "a", "__base__"], **how)
    assert not torch.equal(other, got)


@pytest.mark.parametrize("checkpoint", ["none", "layers"])
def test_training_takes_another_way(checkpoint: str) -> None:
    ids = samples()
    spec = f"{SPEC} compile {{ checkpoint = {checkpoint} }}"
    gradients = []
    for backend in ("eager", None):
        model = mixed(spec, backend).train()
        model(input_ids=ids, adapter_names=NAMES).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    got, want = gradients
    assert got.keys() == want.keys()
    assert any(".a." in name for name in want)
    assert all(relative(got[name], gradient) < 2e-5 for name, gradient in want.items())
