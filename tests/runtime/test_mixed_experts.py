"""Adapters on parameters in mixed batches: experts get rows of several samples, in their order."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.diagnostics import LoraFxError
from tests.adapters.kinds import of, scatter
from tests.adapters.test_experts import IMPLEMENTATIONS, KINDS, Kind, with_implementation
from tests.dense import relative
from tests.runtime.test_mixed_training import gradients, losses
from tests.tiny import uncached

ROUTER = 'target parameter "**.mlp.gate.weight"'
BASES: dict[str, Kind] = {
    **{name: KINDS[name] for name in ("mixtral", "gpt_oss", "qwen3_moe", "olmoe")},
    "deepseek_v3": replace(KINDS["mixtral"], base=of("deepseek_v3")),
}
NAMES = ["two", "one", "__base__", "half", "two", "one"]
ROUTE = 'route { train = true  when "half" -> 0.5 * one - 0.25 * two }'


def spec(targets: str = KINDS["mixtral"].adapter, more: str = ROUTE) -> str:
    """Three adapters of different ranks; `other` is in no batch."""
    return f"""lora 1
adapter one {{ rank = 3  alpha = 5  init = random  {targets} }}
adapter two {{ rank = 2  alpha = 7  scaling = rslora  init = random  {targets} target o_proj }}
adapter other {{ rank = 4  alpha = 3  init = random  {targets} }}
{more}"""


def mixed(
    base: str = "mixtral",
    implementation: str = "grouped_mm",
    backend: str | None = None,
    text: str | None = None,
) -> Any:
    """A model of experts, none of whose adapters is as the base, in evaluation."""
    built = with_implementation(BASES[base], implementation).base()
    model = lora_fx.compile(built, text or spec(), backend=backend).eval()
    for name in model.lora_fx_adapters:
        scatter(model, name)
    return model


def samples(count: int = len(NAMES), length: int = 9) -> Tensor:
    return torch.randint(4, 90, (count, length), generator=torch.Generator().manual_seed(3))


def alone(model: Any, name: str, ids: Tensor) -> Tensor:
    """The logits of samples that all have one adapter, by the model's own means without names."""
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=ids).logits
    model.set_adapter(name)
    return model(input_ids=ids).logits


def assert_as_alone(model: Any) -> None:
    ids = samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    other = alone(model, "other", ids)
    for i, name in enumerate(NAMES):
        if name != "half":
            assert relative(got[i], alone(model, name, ids[i : i + 1])[0]) < 1e-5, name
        assert relative(got[i], other[i]) > 1e-2, name
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert relative(got[2], base[2]) < 1e-6
    some = model(input_ids=ids, adapter_names=["__base__", *NAMES[1:]]).logits
    every = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
    assert torch.equal(some[0], every[0])
    assert not torch.equal(some[1], every[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_each_sample_is_as_it_is_alone(base: str, implementation: str) -> None:
    assert_as_alone(mixed(base, implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_rewritten(backend: str, unit: str, implementation: str) -> None:
    if backend == "inductor" and (unit, implementation) not in (
        ("layers", "batched_mm"),
        ("model", "grouped_mm"),
    ):
        pytest.skip("enough of them")
    text = spec(more=f"{ROUTE} compile {{ unit = {unit} }}")
    assert_as_alone(mixed("mixtral", implementation, backend, text))
    assert_as_alone(mixed("gpt_oss", implementation, backend, text))


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@torch.no_grad()
def test_a_matrix_that_decides_between_experts(backend: str | None) -> None:
    """The router's: its samples go to other experts then."""
    model = mixed(backend=backend, text=spec(ROUTER))
    ids = samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i, name in enumerate(NAMES):
        if name != "half":
            assert relative(got[i], alone(model, name, ids[i : i + 1])[0]) < 1e-5, name
    assert relative(got[0], alone(model, "one", ids[:1])[0]) > 1e-2


@pytest.mark.parametrize("base", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_a_mix_is_a_sum_of_deltas_in_float64(base: str, implementation: str) -> None:
    model, ids = mixed(base, implementation), samples()
    got = model(input_ids=ids, adapter_names=NAMES).logits
    for i, shares in {3: {"one": 0.5, "two": -0.25}, 0: {"two": 1.0}, 2: {}}.items():
        assert relative(got[i], dense(model, base, shares, ids[i : i + 1])[0]) < 1e-5
    wrong = dense(model, base, {"one": 0.5, "two": 0.25}, ids[3:4])
    assert relative(got[3], wrong[0]) > 1e-2


def dense(model: Any, base: str, shares: dict[str, float], ids: Tensor) -> Tensor:
    """The base in float64 with W + Σ c s B A in place of each weight."""
    exact = BASES[base].base().double().eval()
    exact.set_experts_implementation("batched_mm")
    weights = dict(exact.named_parameters())
    for fqn, site in storage.sites(model):
        for name, share in shares.items():
            if name in site.lora_branches:
                own, factors = site.lora_arithmetic[name], site.lora_branches[name]
                A, B = factors.A.weight.double(), factors.B.weight.double()
                is_stack = isinstance(site, ParameterSite)
                A, B = site.split(A, B) if is_stack else (A, B)
                delta = share * own.scaling * B @ A
                turned = is_stack and site.lora_layer.turned
                weights[fqn if is_stack else f"{fqn}.weight"] += delta.mT if turned else delta
    return exact(input_ids=ids).logits


def at_once(model: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    model.zero_grad()
    losses(model(input_ids=ids, adapter_names=names).logits, ids).sum().backward()
    return gradients(model)


def one_by_one(model: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """One backward pass for each adapter, by the model's own means without names."""
    model.zero_grad()
    for adapter in dict.fromkeys(names):
        chosen = [i for i, name in enumerate(names) if name == adapter]
        if adapter != "__base__":
            losses(alone(model, adapter, ids[chosen]), ids[chosen]).sum().backward()
    return gradients(model)


BACKENDS = [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
TRAINED = ["two", "one", "two", "__base__", "one"]


@pytest.mark.parametrize("more", ["", "compile { checkpoint = layers }"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "backend", [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_separate_runs(
    backend: str | None, implementation: str, more: str
) -> None:
    if backend == "inductor" and (implementation == "batched_mm") is not bool(more):
        pytest.skip("enough of them")
    if implementation == "eager" and (backend or more):
        pytest.skip("its loop over the experts that were chosen is not captured")
    model = mixed("mixtral", implementation, backend, spec(more=f"{ROUTE} {more}")).train()
    ids = samples(len(TRAINED))
    got, want = at_once(model, ids, TRAINED), one_by_one(model, ids, TRAINED)
    assert any("gate_up_proj" in name and ".one." in name for name in want)
    for name, gradient in want.items():
        assert relative(got[name], gradient) < 2e-5, name
    for name in got.keys() - want.keys():
        assert ".other." in name
        assert not got[name].any()
    swapped = at_once(model, ids, ["one", "two", *TRAINED[2:]])
    assert any(relative(swapped[name], want[name]) > 1e-2 for name in want)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_absent_adapters_do_not_move(backend: str | None) -> None:
    model, ids = mixed(backend=backend).train(), samples(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    for names in (["one", "two"], ["one", "__base__"], ["two", "other"]):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        losses(model(input_ids=ids, adapter_names=names).logits, ids).mean().backward()
        optimizer.step()
        for adapter in ("one", "two", "other"):
            own = [(n, p) for n, p in model.named_parameters() if f".{adapter}." in n]
            moved = [not torch.equal(p, before[n]) for n, p in own]
            assert all(moved) if adapter in names else not any(moved), adapter


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_zero_recompiles_over_routings(backend: str) -> None:
    with uncached():
        model, ids = mixed(backend=backend), samples()
        model(input_ids=ids, adapter_names=NAMES)
        before = counters["stats"]["unique_graphs"]
        draw = random.Random(5)
        for _ in range(20):
            names = draw.choices(["one", "two", "other", "half", "__base__"], k=len(ids))
            model(input_ids=ids, adapter_names=names)
        assert counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_generated_as_alone() -> None:
    model, ids = mixed(), samples(4, 5)
    names = ["two", "one", "__base__", "other"]
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = model.generate(input_ids=ids, adapter_names=names, **how)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(input_ids=ids[i : i + 1], **how)
        else:
            model.set_adapter(name)
            want = model.generate(input_ids=ids[i : i + 1], **how)
        assert torch.equal(got[i], want[0]), name
    assert not torch.equal(got[0], model.generate(input_ids=ids[:1], **how)[0])


@torch.no_grad()
def test_named_without_a_route() -> None:
    model, ids = mixed(text=spec(more="")), samples(2)
    got = model(input_ids=ids, adapter_names=["one", "two"]).logits
    assert relative(got[1], alone(model, "two", ids[1:])[0]) < 1e-5


@pytest.mark.parametrize("backend", [None, "eager"])
@torch.no_grad()
def test_loaded_into_a_slot(backend: str | None, tmp_path: Path) -> None:
    """Of another rank, whose columns lie elsewhere; it is saved again as it was.

    The other samples stay the same to rounding: the experts multiply more or fewer rows at once.
    """
    donor = mixed(text=spec().replace("rank = 3", "rank = 5"))
    donor.save_pretrained(tmp_path / "from")
    model = mixed(backend=backend, text=spec(more="route { slots = 4  max_rank = 6 }"))
    ids = samples(3)
    before = model(input_ids=ids, adapter_names=["one", "two", "__base__"]).logits
    model.load_adapter(tmp_path / "from" / "one", "new")
    graphs = counters["stats"]["unique_graphs"]
    got = model(input_ids=ids, adapter_names=["new", "two", "__base__"]).logits
    assert counters["stats"]["unique_graphs"] == graphs
    assert relative(got[0], alone(donor, "one", ids[:1])[0]) < 1e-5
    assert relative(got[1:], before[1:]) < 1e-6
    assert relative(got[0], before[0]) > 1e-2
    model.save_pretrained(tmp_path / "to", selected_adapters=["new"])
    want = load_file(tmp_path / "from" / "one" / "adapter_model.safetensors")
    again = load_file(tmp_path / "to" / "new" / "adapter_model.safetensors")
    assert again.keys() == want.keys()
    assert all(torch.equal(again[key], want[key]) for key in want)


def refused(base: Any = None, text: str | None = None) -> str:
    built = base or KINDS["mixtral"].base()
    with pytest.raises(LoraFxError) as raised:
        lora_fx.compile(built, text or spec(), backend=None)
    assert {one.code for one in raised.value.diagnostics} == {"rows-not-samples"}
    return str(raised.value)


def test_tokens_of_all_samples_in_turn_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many rows, and they are of other samples."""
    own = MixtralSparseMoeBlock.forward

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return own(self, hidden_states.transpose(0, 1).contiguous()).transpose(0, 1)

    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", forward)
    text = refused()
    assert "which rows `model.layers.*.mlp.experts` gets of which sample" in text
    assert "<text>:2" in text


def test_rows_that_experts_put_in_an_unknown_order_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = MixtralExperts.forward

    def forward(self: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return own(self, x.flip(0), index.flip(0), weights.flip(0)).flip(0)

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    assert "it is not known which rows are of which sample" in refused()
    model = lora_fx.compile(KINDS["mixtral"].base(), spec(more=""), backend=None).eval()
    ids = samples(2)
    with pytest.raises(LoraFxError, match="which rows are of which sample"):
        model(input_ids=ids, adapter_names=["one", "two"])
    model.set_adapter("one")
    assert model(input_ids=ids).logits.isfinite().all()


def test_what_gives_every_expert_every_token_is_refused() -> None:
    config = Llama4TextConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=44,
        intermediate_size_mlp=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        pad_token_id=0,
    )
    assert "feed_forward.experts" in refused(Llama4ForCausalLM(config))


def test_a_model_that_cannot_be_asked_is_refused() -> None:
    text = 'lora 1 adapter a { rank = 2  target parameter "0.weight" } route { default -> a }'
    assert "none of transformers" in refused(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), text)
