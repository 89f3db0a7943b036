"""Stacked experts: PEFT with equal tensors, and dense float64, compute the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import PreTrainedModel

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.sites.parameter_site import ParameterSite
from tests.adapters.kinds import (
    Kind,
    by_peft,
    dense,
    forward,
    of,
    ours,
    scatter,
    state_of,
    step,
    step_of_peft,
)
from tests.adapters.test_kinds import EXPERTS, STACKS, assert_same
from tests.adapters.test_kinds import KINDS as SHARED
from tests.architectures import LAYERS
from tests.dense import relative
from tests.example_inputs import example_inputs

BOTH = EXPERTS
EXPERTS_OF = 4
PEFT = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


KINDS = {
    "mixtral": SHARED["experts"],
    "gpt_oss": SHARED["turned experts"],
    "a matrix": SHARED["a parameter"],
    "qwen3_moe": Kind(of("qwen3_moe"), BOTH, PEFT, parameters=STACKS),
    "olmoe": Kind(of("olmoe"), BOTH, PEFT, parameters=STACKS),
    "one of two": Kind(
        of("mixtral"),
        'target parameter "**.experts.down_proj"',
        {"target_parameters": ["experts.down_proj"]},
        parameters=("down_proj",),
    ),
    "rslora": Kind(
        of("mixtral"),
        f"scaling = rslora {BOTH}",
        {**PEFT, "use_rslora": True},
        scaling=5 / 3**0.5,
        parameters=STACKS,
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_as_peft_and_as_dense_weights(name: str, implementation: str) -> None:
    kind = with_implementation(KINDS[name], implementation)
    model = ours(kind)
    got, state = step(model), state_of(model)
    assert_same(got, step_of_peft(by_peft(kind, state)))
    assert_same(got, dense(kind, state))
    plain = kind.base()
    inputs = example_inputs(plain)
    with model.disable_adapter(), torch.no_grad():
        off, base = model(**inputs).logits, plain(**inputs).logits
    assert torch.equal(off, base)
    assert relative(got["logits"], base) > 1e-3


def with_implementation(kind: Kind, implementation: str) -> Kind:
    def build() -> PreTrainedModel:
        model = kind.base()
        model.set_experts_implementation(implementation)
        return model

    return replace(kind, base=build)


TWO = f"""lora 1
adapter one {{ rank = 3  alpha = 5  init = random  {BOTH} }}
adapter two {{
  rank = 2  alpha = 7  init = random
  target parameter "**.experts.down_proj", q_proj
}}
"""


def both(backend: Any = None, more: str = "", base: Any = None) -> Any:
    """Two adapters of a Mixtral, neither of which starts as the base."""
    model = lora_fx.compile(base or KINDS["mixtral"].base(), TWO + more, backend=backend)
    scatter(model, "one"), scatter(model, "two")
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    outputs = forward(model, example_inputs(model))
    pairs = ((name, live_tensors(model, name)) for name in model.lora_fx_adapters)
    named = [(f"{name} {n}", t) for name, tensors in pairs for n, t in tensors.items()]
    return outputs | {n: t.grad for n, t in named if t.grad is not None}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_rewritten(name: str, implementation: str, unit: str, backend: str) -> None:
    if (name, implementation, unit) not in {
        ("mixtral", "grouped_mm", "layers"),
        ("mixtral", "batched_mm", "model"),
        ("gpt_oss", "grouped_mm", "layers"),
        ("qwen3_moe", "batched_mm", "layers"),
    }:
        pytest.skip("enough of them")
    kind = with_implementation(KINDS[name], implementation)
    assert_same(step(ours(kind, backend, unit)), step(ours(kind)))


def test_two_at_once() -> None:
    """They add up, whatever form computes them, and experts of both get gradients."""
    models = [both(), both("eager"), both("eager", "compile { checkpoint = layers }")]
    for model in models:
        model.set_adapter(["one", "two"])
    want, *others = [gradients(model.train()) for model in models]
    assert len(want) == 2 + LAYERS * (4 + 4)
    for other in others:
        assert_same(other, want)
    models[0].set_adapter("one")
    assert relative(gradients(models[0])["logits"], want["logits"]) > 1e-3


def test_two_are_the_sum_of_their_deltas() -> None:
    model = both()
    model.set_adapter(["one", "two"])
    want = gradients(model)["logits"]
    model.merge_adapter("two")
    assert relative(model(**example_inputs(model)).logits, want) < 1e-5
    model.merge_adapter("one")
    assert relative(model(**example_inputs(model)).logits, want) < 1e-5
    base = KINDS["mixtral"].base()
    exact = dict(base.double().named_parameters())
    for name, site in storage.sites(model):
        if isinstance(site, ParameterSite):
            total = exact[name]
            for adapter, own in site.lora_arithmetic.items():
                factors = site.lora_branches[adapter]
                A, B = site.split(factors.A.weight.double(), factors.B.weight.double())
                total = total + own.scaling * B @ A
            assert relative(site.weight, total) < 1e-6
            assert relative(site.weight, exact[name]) > 1e-2
    model.unmerge_adapter()
    for name, site in storage.sites(model):
        if isinstance(site, ParameterSite):
            assert torch.equal(site.weight.double(), exact[name])


@pytest.mark.parametrize("method", ["cat", "svd", "ties_svd", "linear"])
def test_combined_expert_by_expert(method: str) -> None:
    """Each as the layer of its own that it is."""
    model = both()
    own = {"svd_rank": 2} if method == "svd" else {}
    own |= {"density": 0.5} if method == "ties_svd" else {}
    pair, weights = (("one", "two"), (0.7, -1.3)) if method in ("cat", "svd") else (("one",), (2,))
    model.add_weighted_adapter(pair, weights, "new", method, **own)
    place = "model.layers.1.mlp.experts.down_proj"
    site = dict(storage.sites(model))[place]
    assert isinstance(site, ParameterSite)
    assert site.lora_rank("new") == {"cat": 5, "svd": 2, "ties_svd": 3, "linear": 3}[method]

    def deltas(adapter: str) -> Tensor:
        factors = site.lora_branches[adapter]
        A, B = site.split(factors.A.weight.detach().double(), factors.B.weight.detach().double())
        return site.lora_arithmetic[adapter].scaling * B @ A

    got, total = deltas("new"), sum(w * deltas(a) for a, w in zip(pair, weights, strict=True))
    if method in ("cat", "linear"):
        assert relative(got, total) < 1e-5
    for one, exact in zip(got, total, strict=True):
        if method == "svd":
            U, S, Vh = torch.linalg.svd(exact)
            assert relative(one, U[:, :2] * S[:2] @ Vh[:2]) < 1e-5
        if method == "ties_svd":
            most = torch.linalg.svdvals(torch.where(exact.abs() >= exact.abs().median(), exact, 0))
            assert abs(torch.linalg.matrix_norm(one) / most[:3].norm() - 1) < 0.02


def test_offloaded() -> None:
    """Accelerate brings in and takes away the stack itself, under adapters."""
    model = both(base=cpu_offload(KINDS["mixtral"].base(), "cpu"))
    assert_same(gradients(model), gradients(both()))
    assert model.model.layers[0].mlp.experts._parameters["down_proj"].is_meta


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("backend", [None, "eager"])
def test_in_bfloat16(backend: Any) -> None:
    """As near to float64 as PEFT, which rounds W + s B A; here tokens change their experts."""
    kind = KINDS["mixtral"]

    def build() -> PreTrainedModel:
        return of("mixtral", intermediate_size=48)().to(torch.bfloat16)

    kind = replace(kind, base=build)
    model = ours(kind, backend)
    got, state = step(model), state_of(model)
    theirs = step_of_peft(by_peft(kind, {k: t.to(torch.bfloat16) for k, t in state.items()}))
    for key, exact in dense(kind, state).items():
        error = relative(theirs[key], exact)
        assert error < (0.2 if "lora" not in key else 1), key
        assert relative(got[key], exact) < 1.5 * error + 1e-2, key


def test_status_and_plan() -> None:
    model = both()
    model.set_adapter(["one", "two"])
    plan = model.lora_fx_plan
    found = {one.name: one for one in model.get_layer_status()}
    place = "model.layers.2.mlp.experts"
    assert found.keys() == {site.name for site in plan.sites}
    down, up = found[f"{place}.down_proj"], found[f"{place}.gate_up_proj"]
    assert (down.module_type, down.ranks) == ("MixtralExperts", {"one": 3, "two": 2})
    assert up.available_adapters == ["one"]
    assert down.bytes == 4 * EXPERTS_OF * (3 + 2) * (32 + 44)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.trainable == trained == model.get_model_status().trainable_params
    memory = plan.memory()
    assert memory["adapters"] == 4 * trained == model.get_model_status().adapter_bytes
    model.merge_adapter(["one", "two"])
    status = model.get_model_status()
    assert plan.merged_bytes == status.merged_bytes > 0
    merged = {one.name: one for one in model.get_layer_status()}
    stack = model.model.layers[0].mlp.experts._parameters["down_proj"]
    assert merged[f"{place}.down_proj"].bytes == down.bytes + stack.nbytes
    assert merged[f"{place}.down_proj"].merged_adapters == ["one", "two"]


@pytest.mark.slow
def test_an_artifact(tmp_path: Any) -> None:
    entry = "compile { entry train { batch = 2  sequence = 9 } }"
    lora_fx.build(TWO + entry, KINDS["mixtral"].base(), tmp_path / "artifact")
    model = lora_fx.load(tmp_path / "artifact", KINDS["mixtral"].base(), backend=None)
    want = lora_fx.compile(KINDS["mixtral"].base(), TWO, backend=None)
    assert_same(gradients(model), gradients(want))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropout = 0.1", "a parameter has no dropout"),
        ("lora_bias = true", "a parameter has no `lora_bias`"),
        ("variant = dora", "a parameter has no variant `dora`"),
        ("init = pissa", "a parameter has no init `pissa`"),
        ("rank = 33", "rank 33 is larger"),
    ],
)
def test_what_has_no_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(lora_fx.LoraFxError, match=message):
        lora_fx.compile(
            KINDS["mixtral"].base(), f"lora 1 adapter a {{ {text} {BOTH} }}", backend=None
        )


def test_one_weight_is_adapted_in_one_way(tmp_path: Any) -> None:
    one = "adapter one { rank = 2  init = random  target q_proj }"
    two = 'adapter two { rank = 2  init = random  target parameter "**.q_proj.weight" }'
    base = KINDS["mixtral"].base
    with pytest.raises(lora_fx.LoraFxError, match="as a module and as a parameter"):
        lora_fx.plan(f"lora 1 {one} {two}", base())
    lora_fx.compile(base(), f"lora 1 {one}", backend=None).save_pretrained(tmp_path)
    model = lora_fx.compile(base(), f"lora 1 {two}", backend=None)
    before = gradients(model)
    with pytest.raises(lora_fx.LoraFxError, match="as a module and as a parameter"):
        model.load_adapter(tmp_path / "one", "one")
    assert_same(gradients(model), before)
    model.delete_adapter("two")
    model.load_adapter(tmp_path / "one", "one")
    model.set_adapter("one")
    want = lora_fx.compile(base(), f"lora 1 {one}", backend=None)
    inputs = example_inputs(model)
    assert torch.equal(model(**inputs).logits, want(**inputs).logits)
