"""`merge` statements carried out when a model is compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.runtime.test_combine import OTHER, PARTS, SAME, assert_same, deltas, exact_sum
from tests.runtime.test_merge import logits, weights_of
from tests.tiny import llama

BOTH = """lora 1
adapter one { weights = "one" }
adapter two { weights = "two" }
"""
MIX = "from 0.7 * one - 1.3 * two"


def base() -> nn.Module:
    return llama(2, attention_bias=True).eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(spec: str = OTHER) -> Any:
    """Two trained adapters in folders; returns the model that they are of."""
    trained = lora_fx.compile(base(), spec, backend=None).eval()
    for name in ("one", "two"):
        scatter(trained, name)
    trained.save_pretrained(".")
    return trained


def compiled(merges: str, backend: Any = None) -> Any:
    return lora_fx.compile(base(), f"{BOTH} {merges}", backend=backend).eval()


def test_an_adapter_is_made(folder: Path) -> None:
    trained = saved()
    model = compiled(f"merge new {{ {MIX} }}")
    assert list(model.lora_fx_adapters) == ["one", "two", "new"]
    assert model.active_adapters() == ["one"]
    assert_same(deltas(model, "new"), exact_sum(trained, one=0.7, two=-1.3))


@pytest.mark.parametrize(
    "method",
    ["svd", "ties_svd(density = 0.6, sign = frequency)", "dare_linear_svd(density = 0.5)"],
)
def test_methods_and_ranks(method: str, folder: Path) -> None:
    trained = saved()
    model = compiled(f"merge new {{ {MIX} method = {method} rank = svd(2) }}")
    name, _, arguments = method.partition("(")
    settings: dict[str, Any] = {"density": float(arguments[10:13])} if arguments else {}
    settings |= {"majority_sign_method": "frequency"} if "frequency" in method else {}
    trained.add_weighted_adapter(["one", "two"], [0.7, -1.3], "new", name, 2, **settings)
    assert_same(deltas(model, "new"), deltas(trained, "new"))
    assert {site.rank for site in model.lora_fx_adapters["new"].sites} == {2}


def test_linear_is_the_sum_and_peft_s_only_if_asked_for(folder: Path) -> None:
    trained = saved(SAME)
    model = compiled(f"""merge exact {{ {MIX} method = linear }}
      merge other {{ {MIX} method = linear(cross_terms = true) }}""")
    want = exact_sum(trained, one=0.7, two=-1.3)
    assert_same(deltas(model, "exact"), want)
    trained.add_weighted_adapter(["one", "two"], [0.7, -1.3], "new", "linear", cross_terms=True)
    assert_same(deltas(model, "other"), deltas(trained, "new"))
    apart = {f: relative(d, want[f]) for f, d in deltas(model, "other").items() if "q_proj" in f}
    assert min(apart.values()) > 0.1


def test_rank_compresses_what_any_method_gives(folder: Path) -> None:
    saved()
    model = compiled(f"merge new {{ {MIX} rank = svd(2) }} merge best {{ {MIX} method = svd }}")
    for fqn, delta in deltas(model, "new").items():
        U, S, Vh = torch.linalg.svd(deltas(model, "best")[fqn])
        assert relative(delta, U[:, :2] * S[:2] @ Vh[:2]) < 1e-5


@pytest.mark.parametrize("spec", [OTHER, PARTS], ids=["sites", "copies, biases and rows"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_into_the_base(spec: str, backend: Any, folder: Path) -> None:
    trained = saved(spec)
    trained.add_weighted_adapter(["one", "two"], [0.7, -1.3], "new", "cat")
    trained.set_adapter("new")
    want = logits(trained)
    model = compiled(f"merge mean {{ {MIX} }} merge all {{ from mean into = base }}", backend)
    assert list(model.lora_fx_adapters) == []
    assert relative(logits(model), want) < 1e-5
    with model.disable_adapter():
        assert relative(logits(model), want) < 1e-5
    assert relative(logits(base()), want) > 1e-3
    assert weights_of(model).keys() == dict(base().named_parameters()).keys()


def test_what_is_trained_starts_from_the_merged_base(folder: Path) -> None:
    trained = saved(PARTS)
    trained.set_adapter("one")
    want = logits(trained)
    more = 'adapter new { rank = 2 target v_proj train "model.norm" }'
    spec = f'lora 1 {more} adapter one {{ weights = "one" }} merge m {{ from one into = base }}'
    model = lora_fx.compile(base(), spec, backend=None).eval()
    assert model.active_adapters() == ["new"]
    assert list(model.lora_fx_adapters) == ["new"]
    assert relative(logits(model), want) < 1e-5
    norm = trained.model.norm.lora_own.one.weight
    assert torch.equal(model.model.norm.lora_own.new.weight, norm)
    scatter(model, "new")
    want = logits(model)
    model.save_pretrained("saved")
    loaded = lora_fx.load("saved", base(), backend=None).eval()
    assert relative(logits(loaded), want) < 1e-6
    (folder / "saved" / "spec.lora").unlink()
    assert relative(logits(lora_fx.load("saved", base(), backend=None).eval()), want) > 1e-3


def test_an_artifact_of_merged_adapters(folder: Path) -> None:
    saved()
    model = compiled(f"merge new {{ {MIX} }}")
    model.set_adapter("new")
    lora_fx.build(f"{BOTH} merge new {{ {MIX} }}", base(), "artifact")
    loaded = lora_fx.load("artifact", base(), backend=None).eval()
    loaded.set_adapter("new")
    assert relative(logits(loaded), logits(model)) < 1e-5
    with pytest.raises(lora_fx.LoraFxError, match="merges into the base"):
        lora_fx.build(f"{BOTH} merge new {{ {MIX} into = base }}", base(), "other")


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("merge m { from one + three }", "no adapter `three`"),
        ("merge m { from one + two method = linear(cross_terms = true) }", "one rank"),
        ("merge keys { from one }", "`keys` is a name"),
        ("adapter new { target v_proj } merge m { from new }", "no weights yet"),
    ],
)
def test_what_is_refused(merge: str, message: str, folder: Path) -> None:
    saved()
    with pytest.raises(lora_fx.LoraFxError, match=message):
        compiled(merge)


def test_a_given_model_is_as_before(folder: Path) -> None:
    saved()
    given = base()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    spec = f"{BOTH} merge m {{ {MIX} into = base }}"
    lora_fx.compile(given, spec, backend=None)
    assert all(torch.equal(before[name], t) for name, t in given.state_dict().items())
    for module in (given.model.layers[0].self_attn.q_proj, given.model.norm):
        module.weight.data.fill_(1e30)
    given.half()
    with pytest.raises(lora_fx.LoraFxError, match="NaN or infinity"):
        lora_fx.compile(given, spec, backend=None, inplace=True)
    assert type(given) is type(base())
