"""Adapters folded into the weights: as before to rounding, and back bit for bit."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.spec.expressions import Word
from tests.adapters import varied
from tests.adapters.kinds import PREFIX, by_peft, materialised, ours, scatter, state_of
from tests.adapters.test_kinds import KINDS
from tests.dense import relative
from tests.example_inputs import example_inputs
from tests.quantised import nf4
from tests.runtime.artifact.made import BATCH, LENGTH, build, text
from tests.tiny import generate, graphs, llama, spec, step, tokens

TWO = spec() + "adapter two { rank = 2 init = random seed = 4 target q_proj, down_proj }"
REFUSED = {"scaled tied embedding"}
MERGED = [name for name in KINDS if name not in REFUSED]
TIED = {"embedding", "dora", "dora and lora"}  # adapt an embedding that a head shares
DOUBLE = {"tied"}  # PEFT adds the delta of a tied weight twice


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**{k: v for k, v in example_inputs(model).items() if k != "labels"}).logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if "lora_" not in name}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_plain(model: nn.Module) -> None:
    assert b"lora" not in pickle.dumps(model)
    for module in model.modules():
        assert "lora_fx" not in str(type(module).__mro__)
        assert not [name for name in dir(module) if name.startswith("lora_")]


@pytest.mark.parametrize("name", MERGED)
def test_merged_computes_the_same_and_unmerged_is_bit_equal(name: str) -> None:
    model = ours(KINDS[name]).eval()
    want, before = logits(model), weights_of(model)
    states = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(5):
        model.merge_adapter()
        assert relative(logits(model), want) < 1e-5
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(KINDS[name].base()))
            assert relative(logits(model), want) > 1e-3
        model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    after = weights_of(model)
    assert all(after[key] is tensor for key, tensor in before.items())
    assert model.state_dict().keys() == states.keys()
    assert all(torch.equal(tensor, states[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MERGED)
def test_merged_and_unloaded_is_peft_s_and_dense(name: str) -> None:
    kind = KINDS[name]
    model = ours(kind).eval()
    want, state = logits(model), state_of(model)
    plain = model.merge_and_unload()
    assert_plain(plain)
    assert type(plain) is type(kind.base())
    assert relative(logits(plain), want) < 1e-5
    exact = materialised(kind.base().double(), {k: t.double() for k, t in state.items()}, kind)
    own, base = parameters(plain), parameters(kind.base())
    assert own.keys() == base.keys()
    assert all(relative(base[key], tensor) > 1e-3 for key, tensor in exact.items())
    assert all(torch.equal(own[key], base[key]) for key in base.keys() - exact.keys())
    assert all(relative(own[key], tensor) < 1e-6 for key, tensor in exact.items())
    if name not in DOUBLE:
        theirs = by_peft(kind, state).merge_and_unload()
        for key, tensor in parameters(theirs).items():
            assert torch.allclose(own[key], tensor, 1e-5, 1e-6), key


@pytest.mark.parametrize("name", ["conv1d", "lora_bias", "bias = all", "train", "tokens", "tied"])
def test_what_was_merged_is_saved_as_a_model(name: str, tmp_path: Path) -> None:
    plain = ours(KINDS[name]).eval().merge_and_unload()
    assert isinstance(plain, PreTrainedModel)
    plain.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(plain)
    assert torch.equal(logits(loaded), logits(plain))
    assert relative(logits(loaded), logits(KINDS[name].base())) > 1e-3


def test_a_copy_of_a_tied_head_unties_the_config(tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 2 init = random target q_proj train lm_head }"
    model = lora_fx.compile(llama(2, tie_word_embeddings=True), text, backend=None).eval()
    scatter(model)
    want = model(tokens()).logits
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert relative(loaded(tokens()).logits, want) < 1e-5
    assert torch.equal(loaded.model.embed_tokens.weight, llama(2).model.embed_tokens.weight)


@pytest.mark.parametrize("kind", [k for k in varied.KINDS if k not in TIED])
def test_modules_that_are_no_models_of_transformers(kind: str) -> None:
    model = varied.compiled(varied.KINDS[kind], None).eval()
    with torch.no_grad():
        want = model(varied.IDS)
        model.merge_adapter()
        got = model(varied.IDS)
        assert relative(got, want) < 1e-5
        model.unmerge_adapter()
        assert torch.equal(model(varied.IDS), want)
        plain = model.merge_and_unload()
        assert_plain(plain)
        assert relative(plain(varied.IDS), want) < 1e-5
        assert relative(varied.Varied().eval()(varied.IDS), want) > 1e-3


def both(backend: str | None = None, layers: int = 2) -> Any:
    return lora_fx.compile(llama(layers), TWO, backend=backend).eval()


def sums(names: list[str]) -> Tensor:
    model = both()
    model.set_adapter(names)
    return logits(model)


def test_merged_and_active_adapters_add_up() -> None:
    model = both()
    base, first, second = sums([]), sums(["default"]), sums(["two"])
    every = sums(["default", "two"])
    model.merge_adapter(["two"])
    assert model.active_adapters() == ["default"]
    assert model.merged_adapters() == ["two"]
    assert relative(logits(model), every) < 1e-5
    model.set_adapter([])
    assert relative(logits(model), second) < 1e-5
    model.merge_adapter("default")
    assert relative(logits(model), every) < 1e-5
    model.set_adapter("two")
    assert relative(logits(model), every) < 1e-5
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.unmerge_adapter()
    assert torch.equal(logits(model), second)
    assert min(relative(a, every) for a in (base, first, second)) > 1e-2


def test_only_what_is_active_trains() -> None:
    model, apart = both().train(), both().train()
    model.merge_adapter("two")
    apart.set_adapter(["default", "two"])
    got, want = step(model, tokens()), step(apart, tokens())
    assert not [name for name in got if ".two." in name]
    assert [name for name in want if ".two." in name]
    for name, tensor in got.items():
        assert relative(tensor, want[name]) < 3e-5


def test_a_second_merge_takes_the_values_of_now() -> None:
    model = both()
    model.merge_adapter()
    scatter(model)
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    assert relative(merged, logits(model)) < 1e-5
    assert relative(merged, sums(["default"])) > 1e-3


def test_what_is_refused_while_merged(tmp_path: Path) -> None:
    model = both()
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    want = logits(model)
    for call in (
        lambda: model.delete_adapter("default"),
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(lora_fx.LoraFxError, match="is merged into the weights"):
            call()
    model.delete_adapter("two")
    assert torch.equal(logits(model), want)
    with pytest.raises(lora_fx.LoraFxError, match="there is no adapter `three`"):
        model.merge_adapter(["three"])


@pytest.mark.parametrize("embeddings", ["auto", True])
def test_saving_while_merged_saves_the_same(embeddings: Any, tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 2 init = random target embed_tokens, q_proj }"
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    for name in ("before", "merged"):
        model.save_adapters(tmp_path / name, save_embedding_layers=embeddings)
        model.merge_adapter()
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    for name in files:
        before, merged = tmp_path / "before" / name, tmp_path / "merged" / name
        assert before.read_bytes() == merged.read_bytes(), name
    model.save_pretrained(tmp_path / "checkpoint-3")
    loaded = lora_fx.load(tmp_path / "merged", llama(2), backend=None).eval()
    assert relative(logits(loaded), logits(model)) < 1e-5


def test_a_weight_put_in_place_is_saved_without_what_is_merged(tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 3 init = loftq target q_proj }"
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    scatter(model)
    want = logits(model)
    model.merge_adapter()
    model.save_adapters(tmp_path)
    loaded = lora_fx.load(tmp_path, llama(2), backend=None).eval()
    assert torch.equal(logits(loaded), want)
    with loaded.disable_adapter():
        assert relative(logits(loaded), want) > 1e-3


def test_copies_and_casts_of_a_merged_model() -> None:
    model = both()
    plain = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    moved = pickle.loads(pickle.dumps(model)).to(torch.float64)
    assert torch.equal(logits(twin), logits(model))
    assert relative(logits(moved), logits(model)) < 1e-5
    model.unmerge_adapter()
    for one in (twin, moved):
        one.unmerge_adapter()
        assert relative(logits(one), plain) < 1e-5
    assert torch.equal(logits(twin), plain)
    weight = moved.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    model = lora_fx.compile(llama(2).to(dtype), TWO, backend=None)
    model.merge_adapter(["default", "two"])
    for layer, base in zip(model.model.layers, llama(2).to(dtype).model.layers, strict=True):
        site, weight = layer.self_attn.q_proj, base.self_attn.q_proj.weight.double()
        for name, scaling in (("default", 1.5), ("two", 4.0)):
            A, B = (f[name].weight.detach().double() for f in (site.lora_A, site.lora_B))
            weight = weight + scaling * B @ A
        assert site.weight.dtype is dtype
        off = (site.weight != weight.to(dtype)).double().mean()
        assert off < 0.01  # float32 sums that lie at the middle of two values


def test_what_is_not_finite_is_refused_and_nothing_is_done() -> None:
    model = both()
    want, before = logits(model), weights_of(model)
    B = model.model.layers[1].mlp.down_proj.lora_B.two.weight
    with torch.no_grad():
        B[3, 1] = torch.nan
    with pytest.raises(lora_fx.LoraFxError, match=r"`model.layers.\*.mlp.down_proj.weight`"):
        model.merge_adapter(["default", "two"])
    with pytest.raises(lora_fx.LoraFxError, match="NaN or infinity"):
        model.merge_and_unload(adapter_names=["two"])
    assert model.merged_adapters() == []
    assert torch.equal(logits(model), want)
    assert all(weights_of(model)[key] is tensor for key, tensor in before.items())
    model.merge_adapter(["two"], safe_merge=False)
    assert logits(model).isnan().all()
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)


SHARED = {
    "tie = true": (llama(2, tie_word_embeddings=True), "target embed_tokens, q_proj", ""),
    "share = nothing": (llama(2), "target q_proj", "layers { replicate 0..2, 1..2 }"),
}


@pytest.mark.parametrize("remedy", SHARED)
def test_shared_weights_are_refused_with_what_to_write(remedy: str) -> None:
    base, target, layers = SHARED[remedy]
    text = f"lora 1 adapter default {{ rank = 2 init = random {target} }} {layers}"
    model = lora_fx.compile(base, text, backend=None).eval()
    want = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lora_fx.LoraFxError, match=remedy):
            call()
    assert torch.equal(logits(model), want)
    mended = text.replace("0..2, 1..2", "0..2, 1..2 share = nothing")
    mended = mended.replace("embed_tokens,", "embed_tokens { tie = true } target")
    model = lora_fx.compile(base, mended, backend=None).eval()
    want = logits(model)
    plain = model.merge_and_unload()
    assert_plain(plain)
    assert relative(logits(plain), want) < 1e-5


def refused_as(model: Any, message: str) -> None:
    """Neither way to merge does anything."""
    want = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lora_fx.LoraFxError, match=message):
            call()
    assert torch.equal(logits(model), want)
    assert model.merged_adapters() == []


def test_packed_weights_are_refused() -> None:
    base = nf4(llama(2, hidden_size=64, intermediate_size=128))
    model = lora_fx.compile(base, spec(), backend=None).eval()
    refused_as(model, "stored in 4 or 8 bits")
    with model.disable_adapter():
        want = logits(model)
    plain = model.unload()
    assert_plain_but(plain)
    assert torch.equal(logits(plain), want)


def assert_plain_but(model: nn.Module) -> None:
    """As `assert_plain`, of what bitsandbytes cannot pickle."""
    assert not [n for m in model.modules() for n in dir(m) if n.startswith("lora_")]
    assert not [m for m in model.modules() if "lora_fx" in str(type(m).__mro__)]


def test_offloaded_weights_are_refused() -> None:
    base = cpu_offload(llama(2).eval())
    model = lora_fx.compile(base, spec(), backend=None).eval()
    refused_as(model, "is offloaded")
    plain = model.unload()
    assert_plain_but(plain)
    assert torch.equal(logits(plain), logits(llama(2).eval()))
    text = 'lora 1 adapter default { rank = 2 target q_proj train "model.norm" }'
    model = lora_fx.compile(base, text.replace("q_proj", "embed_tokens"), backend=None).eval()
    refused_as(model, "is offloaded")


CHANGED = """lora 1
adapter default { rank = 3 init = pissa target q_proj, down_proj }
adapter two { rank = 2 init = random target q_proj, up_proj }
"""


def test_an_adapter_whose_init_changed_the_weight() -> None:
    def changed() -> Any:
        model = lora_fx.compile(llama(2), CHANGED, backend=None).eval()
        scatter(model)
        return model

    model, base = changed(), logits(llama(2).eval())
    results = {}
    for names in ((), ("default",), ("two",), ("default", "two")):
        model.set_adapter(names)
        results[names] = logits(model)
    assert relative(results["default",], results[()]) > 1e-2
    for merged, active in ((("default",), ("two",)), (("two",), ("default",))):
        model.set_adapter(active)
        model.merge_adapter(merged)
        assert relative(logits(model), results["default", "two"]) < 1e-5
        model.set_adapter(())
        assert relative(logits(model), results[merged]) < 1e-5
        with model.disable_adapter():
            assert torch.equal(logits(model), results[()])
        model.unmerge_adapter()
        assert torch.equal(logits(model), results[()])
    model.merge_adapter("two")
    with pytest.raises(lora_fx.LoraFxError, match="`two` is merged"):
        model.delete_adapter("default")
    for names in (("default",), ("two",), ("default", "two")):
        plain = changed().merge_and_unload(adapter_names=names)
        assert_plain(plain)
        assert relative(logits(plain), results[names]) < 1e-5
    model.merge_adapter("default")
    plain = model.unload()
    assert_plain(plain)
    assert relative(logits(plain), base) < 1e-5


def test_a_start_is_not_put_into_a_merged_weight(tmp_path: Path) -> None:
    """The folder says nothing of a start; the adapter that is there has changed the weight."""
    plain = "lora 1 adapter default { rank = 6 init = random target q_proj }"
    want = lora_fx.compile(llama(2), plain, backend=None).eval()
    scatter(want)
    want.save_adapters(tmp_path)
    text = """lora 1 adapter default { rank = 3 init = pissa target q_proj }
    adapter two { rank = 2 init = random target q_proj }"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    model.merge_adapter("two")
    before = logits(model)
    with pytest.raises(lora_fx.LoraFxError, match="`two` is merged"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")
    assert relative(logits(model), logits(want)) < 1e-5
    assert relative(logits(model), before) > 1e-3


def test_norms_are_of_the_base_s_own_weight() -> None:
    text = """lora 1 adapter default { rank = 3 init = random target q_proj }
    adapter two { rank = 2 variant = dora init = random target q_proj }"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    model.set_adapter(["default", "two"])
    with pytest.raises(lora_fx.LoraFxError, match="`two` has norms"):
        model.merge_adapter("default")
    model.set_adapter("two")
    want = logits(model)
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    model.unmerge_adapter()
    model.set_adapter(["default", "two"])
    want = logits(model)
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match="`two` has norms"):
        model.set_adapter("two")


def test_norms_are_of_the_weight_that_another_merged_adapter_trains() -> None:
    name = "model.layers.0.self_attn.q_proj"
    text = f"""lora 1 adapter default {{ rank = 3 variant = dora init = random target q_proj }}
    adapter two {{ rank = 2 init = random target k_proj train "{name}" }}"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    scatter(model)
    model.set_adapter("default")
    alone = logits(model)
    model.set_adapter(["default", "two"])
    with torch.no_grad():
        own = model.get_parameter(f"{name}.weight")
        own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) / 20)
    want = logits(model)
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    assert relative(alone, want) > 1e-2


def test_what_becomes_active_when_another_is_deleted_goes_with_what_is_merged() -> None:
    text = """lora 1 adapter default { rank = 3 variant = dora init = random target q_proj }
    adapter two { rank = 2 init = random target q_proj }
    adapter three { rank = 4 init = random target q_proj }"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    model.set_adapter("three")
    model.merge_adapter("two")
    want = logits(model)
    with pytest.raises(lora_fx.LoraFxError, match="`default` has norms"):
        model.delete_adapter("three")
    assert torch.equal(logits(model), want)
    model.unmerge_adapter()
    model.delete_adapter("three")
    assert model.active_adapters() == ["default"]
    assert relative(logits(model), want) > 1e-3


def test_a_variant_that_is_no_sum_is_refused() -> None:
    model = both()
    plan = model.lora_fx_adapters["default"]
    sites = tuple(replace(site, variant=Word("alora")) for site in plan.sites)
    model.lora_fx_adapters = {**model.lora_fx_adapters, "default": replace(plan, sites=sites)}
    refused_as(model, "`default` is `alora`")


def test_compiled_code_of_an_artifact_is_not_called_for_other_weights(tmp_path: Path) -> None:
    base = build(tmp_path / "artifact", text())
    model = lora_fx.load(tmp_path / "artifact", base).eval()
    marked = lora_fx.load(tmp_path / "artifact", base, backend=None).eval()
    ids = tokens(BATCH, LENGTH)
    with torch.no_grad():
        want = marked(ids).logits
        assert relative(model(ids).logits, want) < 1e-5
        model.merge_adapter()
        with pytest.warns(UserWarning, match="no compiled code for this call"):
            assert relative(model(ids).logits, want) < 1e-5
        with model.disable_adapter():
            assert relative(model(ids).logits, want) > 1e-3
        model.unmerge_adapter()
        assert relative(model(ids).logits, want) < 1e-5


def test_an_adapter_that_trains_the_merged_weight_is_refused() -> None:
    text = """lora 1 adapter default { rank = 2 init = random target q_proj }
    adapter two { rank = 2 init = random target v_proj train "model.layers.0.self_attn.q_proj" }"""
    model = lora_fx.compile(llama(2), text, backend=None).eval()
    scatter(model, "two")
    model.set_adapter(["default", "two"])
    want = logits(model)
    with pytest.raises(lora_fx.LoraFxError, match="`two` trains"):
        model.merge_adapter("default")
    model.merge_adapter()
    assert relative(logits(model), want) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match="`two` trains"):
        model.set_adapter("two")


@pytest.mark.parametrize("name", ["train", "tied", "tokens tied and scaled", "bias = all"])
def test_unloaded_is_the_base(name: str) -> None:
    model = ours(KINDS[name]).eval()
    model.merge_adapter()
    plain = model.unload()
    assert_plain(plain)
    assert torch.equal(logits(plain), logits(KINDS[name].base()))
    base = KINDS[name].base().state_dict()
    assert plain.state_dict().keys() == base.keys()


@pytest.mark.parametrize("unit", ["layers", "model"])
def test_merging_costs_no_more_graphs_than_switching_off(unit: str) -> None:
    model = lora_fx.compile(llama(4), spec(unit), backend="eager").eval()
    with torch.no_grad():
        want = model(tokens()).logits
        with model.disable_adapter():
            base = model(tokens()).logits
        model.merge_adapter()
        merged = model(tokens()).logits
        before = graphs()
        for _ in range(3):
            model.unmerge_adapter()
            assert relative(model(tokens()).logits, want) < 1e-6
            model.merge_adapter()
            assert torch.equal(model(tokens()).logits, merged)
            with model.disable_adapter():
                assert relative(model(tokens()).logits, base) < 1e-6
    assert graphs() == before
    assert relative(merged, want) < 1e-5
    program = lora_fx.capture(model, input_ids=tokens(), use_cache=False)
    assert "lora" not in program.text("captured")
    model.unmerge_adapter()
    captured = lora_fx.capture(model, input_ids=tokens(), use_cache=False)
    assert "lora_fx.site" in captured.text("captured")


@pytest.mark.parametrize("layout", ["plain", "augmented"])
def test_merged_weights_under_inductor(layout: str) -> None:
    text = f"{TWO} compile {{ layout = {layout} }}".replace("compile { unit = layers }", "")
    model, marked = (lora_fx.compile(llama(2), text, backend=b) for b in ("inductor", None))
    for one in (model, marked):
        one.set_adapter(["default", "two"])
    want = step(marked, tokens())
    assert relative(step(model, tokens())["loss"], want["loss"]) < 1e-5
    for one in (model, marked):
        one.merge_adapter("two")
    got, merged = step(model, tokens()), step(marked, tokens())
    for name, tensor in merged.items():
        assert relative(got[name], tensor) < 3e-5, name
        assert relative(tensor, want[name]) < 3e-5, name
    model.unmerge_adapter()
    model.set_adapter("default")
    assert relative(step(model, tokens())["loss"], want["loss"]) > 1e-3


def test_generate_while_merged_and_afterwards() -> None:
    model = both("eager", 3)
    want = generate(model, tokens(2))
    model.merge_adapter()
    assert torch.equal(generate(model, tokens(2)), want)
    plain = model.merge_and_unload()
    assert torch.equal(generate(plain, tokens(2)), want)
    assert not torch.equal(generate(llama(3).eval(), tokens(2)), want)
    assert_plain(plain)


def test_the_names_in_a_file_are_those_of_live_tensors() -> None:
    model = both()
    before = {name: id(t) for name, t in live_tensors(model, "default").items()}
    model.merge_adapter()
    assert {name: id(t) for name, t in live_tensors(model, "default").items()} == before
    assert all(f"{PREFIX}{name}" in state_of(model) for name in before)


def test_rows_of_an_embedding_that_is_merged_into_are_refused() -> None:
    """Live the adapter adds to the rows too; merged, they would stand in its place."""
    text = """lora 1
    adapter one { rank = 2 init = random target embed_tokens }
    adapter two { rank = 3 init = random target q_proj tokens [1, 4] in embed_tokens }
    """
    model: Any = lora_fx.compile(llama(2), text, backend=None).eval()
    model.set_adapter(["one", "two"])
    want = logits(model)
    with pytest.raises(lora_fx.LoraFxError, match=r"`two` has rows of `model\.embed_tokens`"):
        model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match=r"`two` has rows"):
        model.merge_adapter("one")
    with pytest.raises(lora_fx.LoraFxError, match=r"`two` has rows"):
        model.merge_and_unload()
    assert torch.equal(logits(model), want)
    model.set_adapter("one")
    model.merge_adapter()
    with pytest.raises(lora_fx.LoraFxError, match=r"`two` has rows"):
        model.set_adapter(["one", "two"])
