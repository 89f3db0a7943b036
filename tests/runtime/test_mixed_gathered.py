"""Mixed batches whose samples get their own factors are what they are when all are computed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.rules import gather_samples
from tests.dense import relative
from tests.quantised import nf4
from tests.runtime.mixed import NAMES, alone, mixed, samples
from tests.runtime.test_invocation import NAMES as INVOKED
from tests.runtime.test_invocation import mixed_samples, two
from tests.runtime.test_mixed_batch import dense
from tests.runtime.test_mixed_training import assert_as_apart, at_once, of, one_by_one
from tests.tiny import llama, tokens

BACKENDS = ["eager", "inductor"]
TRAINED = ["a", "d", "a", "__base__", "c", "d"]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Whatever it costs; what the rule asked is kept."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gather_samples, "is_gathered", lambda *args: asked.append(args) or True)
    return asked


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_each_sample_is_as_it_is_alone(backend: str, always: list[Any]) -> None:
    model, ids = mixed(backend=backend), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    assert ("cpu", 8, 17, [4, 3], 2) in always
    for i, name in enumerate(NAMES):
        if name not in ("half", "dora"):
            want = alone(model, name, input_ids=ids[i : i + 1])[0]
            assert relative(got[i], want) < 1e-5, name
    of_mixes = {3: {"a": 0.5, "b": -0.25}, 6: {"d": 0.4, "a": 1.0}}
    for i, shares in of_mixes.items():
        assert relative(got[i], dense(model, shares, ids[i : i + 1])[0]) < 1e-5
    assert relative(got[3], dense(model, {"a": 0.5, "b": 0.25}, ids[3:4])[0]) > 1e-2
    other = [*NAMES[1:], NAMES[0]]
    before = counters["stats"]["unique_graphs"]
    assert relative(model(input_ids=ids, adapter_names=other).logits, got) > 1e-2
    assert counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_it_is_what_all_adapters_masked_are_in_bfloat16() -> None:
    model, ids = mixed(backend="eager").to(torch.bfloat16), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i in (0, 1, 2, 4, 5):
        want = alone(model, NAMES[i], input_ids=ids[i : i + 1])[0]
        assert relative(got[i], want) < 5 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_samples_of_the_base_are_the_base_bit_for_bit(backend: str) -> None:
    model, ids = mixed(backend=backend), samples()
    some = [name if i % 2 else "__base__" for i, name in enumerate(NAMES)]
    got = model(input_ids=ids, adapter_names=some).logits
    base = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    assert torch.equal(got[::2], base[::2])
    assert not torch.equal(got[1::2], base[1::2])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_are_those_of_separate_runs(backend: str) -> None:
    model, ids = mixed(backend=backend).train(), samples(len(TRAINED))
    got, want = at_once(model, ids), one_by_one(model, ids)
    assert {name for name in "abcd" if any(of(n, name) for n in want)} == {"a", "c", "d"}
    assert_as_apart(got, want)
    swapped = at_once(model, ids, ["d", "a", *TRAINED[2:]])
    assert any(relative(swapped[name], want[name]) > 1e-2 for name in want)


def test_a_mix_teaches_each_of_its_adapters() -> None:
    gathered, masked, ids = mixed(backend="eager").train(), mixed(backend=None).train(), samples(3)
    names = ["half", "b", "half"]
    got, want = (at_once(model, ids, names) for model in (gathered, masked))
    assert got.keys() == want.keys()
    for name in got:
        if of(name, "a") or of(name, "b"):
            assert want[name].any()
            assert relative(got[name], want[name]) < 2e-5, name
    other = at_once(gathered, ids, ["half", "b", "b"])
    assert any(relative(other[name], want[name]) > 1e-2 for name in want if of(name, "a"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_own_samples(backend: str) -> None:
    plain = "\n".join(
        f"adapter {n} {{ rank = {r} init = random target linear }}" for n, r in (("a", 4), ("b", 3))
    )
    spec = f"lora 1\n{plain}\nroute {{ train = true }}"
    model: Any = mixed(spec, backend).train()
    ids = tokens(4, 9)
    names = ["a", "b", "__base__", "a"]
    before, want = model(input_ids=ids, adapter_names=names).logits, at_once(model, ids, names)
    sick = model.model.layers[0].mlp.up_proj.lora_A["b"].weight
    sick.data[1, 2] = torch.nan
    after, got = model(input_ids=ids, adapter_names=names).logits, at_once(model, ids, names)
    rest = [0, 2, 3]
    assert torch.equal(after[rest], before[rest])
    assert after[1].isnan().all()
    for name in (name for name in want if of(name, "a")):
        assert torch.equal(got[name], want[name]), name


def test_dropout_is_drawn_for_each_sample(always: list[Any]) -> None:
    spec = """lora 1
adapter a { rank = 4 dropout = 0.5 init = random target q_proj }
adapter b { rank = 3 dropout = 0.5 init = random target q_proj }
adapter c { rank = 2 init = random target up_proj }
route { train = true }"""
    model, ids = mixed(spec, "eager").train(), samples(1).repeat(4, 1)
    names = ["a", "a", "b", "c"]
    first, second = (model(input_ids=ids, adapter_names=names).logits for _ in range(2))
    assert ("cpu", 4, 17, [4, 3], 1) in always
    assert relative(first[3], second[3]) < 1e-6
    assert all(relative(first[i], second[i]) > 1e-3 for i in range(3))
    assert relative(first[0], first[1]) > 1e-3
    model.eval()
    first, second = (model(input_ids=ids, adapter_names=names).logits for _ in range(2))
    assert torch.equal(first, second)
    assert relative(first[0], first[1]) < 1e-6


def test_dropout_of_a_mix_is_of_each_branch(always: list[Any]) -> None:
    """With a mask for each adapter: gathered it would have one."""
    spec = """lora 1
adapter a { rank = 4 dropout = 0.5 init = random target q_proj }
adapter b { rank = 3 dropout = 0.5 init = random target q_proj }
route { train = true  when "both" -> a + b }"""
    model, ids = mixed(spec, "eager").train(), samples(2)
    model(input_ids=ids, adapter_names=["both", "a"])
    assert not always


@torch.no_grad()
def test_an_adapter_that_is_two_branches(always: list[Any]) -> None:
    """Which took a part out of the weight that a multiplier gives back."""
    spec = """lora 1
    adapter p { rank = 4 alpha = 4 init = pissa target q_proj, v_proj }
    adapter a { rank = 3 alpha = 6 init = random target q_proj, up_proj }
    adapter b { rank = 2 init = random target up_proj }
    route { default -> p }"""
    gathered, masked = mixed(spec, "eager"), mixed(spec, None)
    ids, got = samples(3), []
    for model in (gathered, masked):
        model.set_adapter("p")
        with model.rescale_adapter_scale(0.5):
            got.append(model(input_ids=ids, adapter_names=["p", "a", "b"]).logits)
    assert always
    assert relative(got[0], got[1]) < 1e-5
    assert relative(got[0], masked(input_ids=ids, adapter_names=["p", "a", "b"]).logits) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_row_of_each_sample(dtype: torch.dtype, always: list[Any]) -> None:
    spec = """lora 1
    adapter a { rank = 4 init = random target linear }
    adapter b { rank = 3 init = random target linear }"""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)).to(dtype)
    gathered, masked = (lora_fx.compile(base, spec, backend=b) for b in ("eager", None))
    x = torch.randn(4, 5, dtype=dtype)
    got, want = (m.eval()(x, adapter_names=["a", "b", "__base__", "a"]) for m in (gathered, masked))
    assert always
    assert relative(got, want) < 8 * torch.finfo(dtype).eps
    assert relative(masked(x, adapter_names=["b", "b", "a", "b"]), want) > 1e-2


@torch.no_grad()
def test_beside_an_adapter_that_waits_for_its_invocation(always: list[Any]) -> None:
    gathered, masked, ids = two("eager"), two(None), mixed_samples()
    got, want = (m(input_ids=ids, adapter_names=INVOKED).logits for m in (gathered, masked))
    assert always
    assert relative(got, want) < 1e-5
    other = ["lora", *INVOKED[1:]]
    assert relative(masked(input_ids=ids, adapter_names=other).logits, want) > 1e-2


@torch.no_grad()
def test_beside_dora_over_packed_weights(always: list[Any]) -> None:
    spec = """lora 1
    adapter a { rank = 4 init = random target linear }
    adapter b { rank = 3 init = random target linear }
    adapter d { rank = 2 init = random variant = dora target linear }
    route { train = true }"""
    gathered, masked = (lora_fx.compile(nf4(llama(2)), spec, backend=b) for b in ("eager", None))
    ids, names = tokens(4, 9), ["d", "a", "b", "d"]
    got, want = (m.eval()(input_ids=ids, adapter_names=names).logits for m in (gathered, masked))
    assert always
    assert relative(got, want) < 1e-5
    assert relative(masked(input_ids=ids, adapter_names=["a", *names[1:]]).logits, want) > 1e-3
