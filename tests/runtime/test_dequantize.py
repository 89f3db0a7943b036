"""Merged into weights in 4 or 8 bits: the layers are plain then, to their last numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import lora_fx
import lora_fx.compiler.compile as compile_module
from lora_fx.adapters.dynamic_class import base_of
from lora_fx.plan.packed import packing_of
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.quantised import fp4, int8, nf4
from tests.runtime.test_merge import assert_plain, logits
from tests.tiny import assert_equal, llama, step, tokens

PACKED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": nf4,
    "nf4 in bfloat16": lambda model: nf4(model, quant_storage=torch.bfloat16),
    "fp4": fp4,
    "int8": int8,
}
SITES = "rank = 3 alpha = 5 init = random target q_proj, up_proj"
INTO = "merge all { from %s into = base(dequantize = true) }"


def base(dtype: torch.dtype = torch.float32) -> Any:
    model = llama(2, attention_bias=True, hidden_size=64, intermediate_size=192)
    return model.to(dtype).eval()


def values(module: Any) -> Tensor:
    """What bitsandbytes says that a packed weight is, in float64."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return module.weight.data.double() * scales.double()[:, None] / 127
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double()


def adapted(model: nn.Module, text: str = SITES, name: str = "one") -> Any:
    made = lora_fx.compile(model, f"lora 1 adapter {name} {{ {text} }}", backend=None).eval()
    scatter(made, name)
    return made


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("method", PACKED)
def test_merged_and_unloaded_is_dense(method: str, variant: str) -> None:
    given = PACKED[method](base())
    model = adapted(given, f"{SITES} variant = {variant}")
    want = logits(model)
    site, other = model.model.layers[1].self_attn.q_proj, model.model.layers[1].mlp.down_proj
    W = values(site)
    A, B = (f["one"].weight.detach().double() for f in (site.lora_A, site.lora_B))
    dense = W + 5 / 3 * B @ A
    if variant == "dora":
        m = site.lora_magnitude_vector["one"].weight.detach().double()
        dense = (m / dense.norm(dim=1))[:, None] * dense
    plain = model.merge_and_unload(dequantize=True)
    merged = plain.model.layers[1].self_attn.q_proj
    assert type(merged) is nn.Linear
    assert vars(merged).keys() == vars(nn.Linear(1, 1)).keys()
    assert merged._load_state_dict_pre_hooks == {}
    assert merged.weight.dtype is torch.float32
    assert relative(merged.weight.double(), dense) < 1e-6
    assert relative(W, dense) > 1e-2
    assert relative(logits(plain), want) < (1e-5 if method != "int8" else 1e-2)
    assert relative(logits(given), want) > 2e-2
    assert type(plain.model.layers[1].mlp.down_proj) is type(other) is not nn.Linear


def test_all_merged_into_is_a_plain_model_and_can_be_pickled() -> None:
    plain = adapted(nf4(base()), "rank = 2 init = random target linear except lm_head")
    plain = plain.merge_and_unload(dequantize=True)
    assert_plain(plain)
    assert plain.half().model.layers[0].mlp.up_proj.weight.dtype is torch.float16


def test_it_is_refused_if_not_asked_for_and_if_not_finite() -> None:
    model = adapted(nf4(base()))
    want = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(lora_fx.LoraFxError, match="dequantize=True"):
            call()
    with torch.no_grad():
        kept = model.model.layers[0].mlp.up_proj.lora_B.one.weight.clone()
        model.model.layers[0].mlp.up_proj.lora_B.one.weight[3, 1] = torch.nan
        with pytest.raises(lora_fx.LoraFxError, match="NaN or infinity"):
            model.merge_and_unload(dequantize=True)
        model.model.layers[0].mlp.up_proj.lora_B.one.weight.copy_(kept)
    assert torch.equal(logits(model), want)
    site = model.model.layers[0].mlp.up_proj
    assert base_of(type(site)) is bnb.nn.Linear4bit


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_dtype_is_that_of_the_model_and_rounded_once(method: str) -> None:
    model = adapted(PACKED[method](base(torch.bfloat16)), f"{SITES} dtype = float32")
    site = model.model.layers[0].self_attn.q_proj
    A, B = (f["one"].weight.detach().double() for f in (site.lora_A, site.lora_B))
    dense = values(site) + 5 / 3 * B @ A
    bias = site.bias.dtype
    plain = model.merge_and_unload(dequantize=True)
    merged = plain.model.layers[0].self_attn.q_proj
    assert bias is merged.bias.dtype is merged.weight.dtype is torch.bfloat16
    assert (merged.weight.detach() != dense.bfloat16()).double().mean() < 0.01
    assert logits(plain).isfinite().all()


def test_what_another_init_took_out_is_put_back_without_packing_it_again() -> None:
    text = f"""lora 1
    adapter first {{ rank = 2 init = pissa target q_proj }}
    adapter one {{ {SITES} }}
    quantize linear {{ method = nf4 }}"""
    model: Any = lora_fx.compile(base(), text, backend=None).eval()
    for name in ("first", "one"):
        scatter(model, name)
    model.set_adapter("one")
    want = logits(model)
    plain = model.merge_and_unload(dequantize=True)
    assert relative(logits(plain), want) < 1e-5
    model = lora_fx.compile(base(), text, backend=None).eval()
    for name in ("first", "one"):
        scatter(model, name)
    model.set_adapter(["first", "one"])
    want = logits(model)
    assert relative(logits(model.merge_and_unload(dequantize=True)), want) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["q_proj, up_proj", "linear except lm_head"])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_saved_and_loaded_as_transformers_does(
    bits: int, target: str, tmp_path: Path
) -> None:
    base().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model = adapted(given.eval(), f"rank = 2 init = random target {target}")
    plain = model.merge_and_unload(dequantize=True)
    whole = target.startswith("linear")
    assert hasattr(plain.config, "quantization_config") is not whole
    assert getattr(plain, f"is_loaded_in_{bits}bit", False) is not whole
    assert getattr(given, f"is_loaded_in_{bits}bit")
    assert given.config.quantization_config.llm_int8_skip_modules is None
    plain.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for name, module in plain.named_modules():
        twin = loaded.get_submodule(name)
        assert type(twin) is type(module), name
        if packing_of(module) is not None:
            assert torch.equal(values(twin), values(module))
        elif isinstance(module, nn.Linear):
            assert torch.equal(twin.weight, module.weight)
    assert relative(logits(given), logits(plain)) > 2e-2
    # bitsandbytes computes what is left in bfloat16 where the processor has such products
    assert relative(logits(loaded), logits(plain)) < (1e-6 if whole or bits == 8 else 2e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_packed_conv1d_is_one_again(tmp_path: Path) -> None:
    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 97, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True)
    given = GPT2LMHeadModel.from_pretrained(tmp_path / "base", quantization_config=config).eval()
    model = adapted(given, "rank = 2 init = random target linear except lm_head")
    want = logits(model)
    plain = model.merge_and_unload(dequantize=True)
    assert relative(logits(plain), want) < 1e-5
    fresh = GPT2LMHeadModel(GPT2Config(**sizes))
    for name, module in fresh.named_modules():
        assert type(plain.get_submodule(name)) is type(module), name
    plain.save_pretrained(tmp_path / "merged")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(plain))
    assert relative(logits(given), want) > 1e-3


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("method", PACKED)
def test_the_statement_merges_into_a_base_that_came_packed(
    method: str, backend: Any, tmp_path: Path
) -> None:
    given = PACKED[method](base())
    trained = adapted(given)
    trained.save_adapters(tmp_path)
    into = INTO % "one"
    spec = f'lora 1 adapter one {{ weights = "{tmp_path / "one"}" }} {into}'
    spec += "adapter new { rank = 2 target q_proj }"
    model: Any = lora_fx.compile(given, spec, backend=backend).eval()
    want = logits(trained.merge_and_unload(dequantize=True))
    assert relative(logits(model), want) < 1e-5
    assert relative(logits(given), want) > 2e-2
    merged, other = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.down_proj
    assert base_of(type(merged)) is nn.Linear
    assert type(other) is type(given.model.layers[0].mlp.down_proj) is not nn.Linear
    scatter(model, "new")
    trained_on = logits(model)
    assert relative(trained_on, want) > 2e-2
    model.merge_adapter()
    # int8 layers round what they get: its last bit can be a step of theirs
    assert relative(logits(model), trained_on) < (5e-3 if method == "int8" else 1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_statement_merges_into_what_the_spec_packs(variant: str, tmp_path: Path) -> None:
    quantize = "quantize linear { method = nf4(double_quant = true) }"
    text = f"adapter one {{ {SITES} variant = {variant} }}"
    trained: Any = lora_fx.compile(base(), f"lora 1 {quantize} {text}", backend=None).eval()
    scatter(trained, "one")
    want = logits(trained)
    trained.save_adapters(tmp_path)
    merge = f'adapter one {{ weights = "{tmp_path / "one"}" }} {INTO % "one"}'
    given = base()
    model: Any = lora_fx.compile(given, f"lora 1 {quantize} {merge}", backend=None).eval()
    assert relative(logits(model), want) < 1e-5
    whole: Any = lora_fx.compile(given, f"lora 1 {merge}", backend=None).eval()
    assert relative(logits(whole), want) > 1e-2
    attention = model.model.layers[0].self_attn
    assert base_of(type(attention.q_proj)) is nn.Linear
    assert type(attention.k_proj) is bnb.nn.Linear4bit
    skipped = model.config.quantization_config.llm_int8_skip_modules
    assert "model.layers.0.self_attn.q_proj" in skipped
    assert "model.layers.0.self_attn.k_proj" not in skipped
    assert torch.equal(
        given.model.layers[0].mlp.up_proj.weight, base().model.layers[0].mlp.up_proj.weight
    )
    plan = model.lora_fx_plan
    assert plan.dequantized.keys() == {site.fqn for site in plan.sites}
    assert not plan.dequantized.keys() & plan.quantized.keys()


def test_the_plan_counts_what_is_plain_then(tmp_path: Path) -> None:
    given = nf4(base())
    adapted(given).save_adapters(tmp_path)
    adapter = f'lora 1 adapter one {{ weights = "{tmp_path / "one"}" }}'
    before = lora_fx.plan(adapter, given).memory()["base"]
    after = lora_fx.plan(f"{adapter} {INTO % 'one'}", given).memory()["base"]
    model: Any = lora_fx.compile(given, f"{adapter} {INTO % 'one'}", backend=None)
    sizes = sum(
        module.weight.nbytes
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "up_proj"))
    )
    packed = 0
    for name, module in given.named_modules():
        if name.endswith(("q_proj", "up_proj")):
            state: Any = module.weight.quant_state
            packed += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert after - before == sizes - packed > 0


def test_what_an_init_left_and_was_packed_is_refused(tmp_path: Path) -> None:
    quantize = "quantize linear { method = nf4 }"
    text = "adapter one { rank = 2 init = pissa target q_proj }"
    trained: Any = lora_fx.compile(base(), f"lora 1 {quantize} {text}", backend=None)
    trained.save_adapters(tmp_path)
    named = f'adapter one {{ weights = "{tmp_path / "one"}" rank = 2 init = pissa target q_proj }}'
    spec = f"lora 1\n{quantize}\n{named}\n{INTO % 'one'}"
    with pytest.raises(lora_fx.LoraFxError, match="without what init `pissa` takes out") as error:
        lora_fx.compile(base(), spec, backend=None)
    assert ":4:" in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_not_streamed_into_what_is_packed(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True)
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    given.save_pretrained(tmp_path / "packed")
    adapted(given.eval()).save_adapters(tmp_path)
    out = f'from one into = base(dequantize = true) save = "{tmp_path / "out"}"'
    spec = f'adapter one {{ weights = "{tmp_path / "one"}" }} merge all {{ {out} }}'
    with pytest.raises(lora_fx.LoraFxError, match=r"in U8(.|\n)*compile the spec"):
        lora_fx.merge(f"lora 1 {spec}", tmp_path / "packed")
    with pytest.raises(lora_fx.LoraFxError, match="quantises cannot be merged into"):
        lora_fx.merge(f"lora 1 quantize linear {{ method = nf4 }} {spec}", tmp_path / "base")
    assert not (tmp_path / "out").exists()
    lora_fx.merge(f"lora 1 {spec}", tmp_path / "base")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_what_peft_merges_into_what_transformers_dequantises(
    bits: int, tmp_path: Path
) -> None:
    base().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model = adapted(given.eval(), "rank = 3 alpha = 5 init = random target linear except lm_head")
    model.save_adapters(tmp_path)
    plain = model.merge_and_unload(dequantize=True)
    theirs = PeftModel.from_pretrained(given.dequantize(), tmp_path / "one").merge_and_unload()
    wanted = dict(theirs.named_parameters())
    assert dict(plain.named_parameters()).keys() == wanted.keys()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(parameter, wanted[name].to(parameter), 1e-5, 1e-6), name
    assert relative(logits(plain), logits(theirs.float().eval())) < 1e-5
    assert relative(logits(base()), logits(plain)) > 1e-2


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_given_tree_is_as_before_if_what_comes_later_fails(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = PACKED[method](base())
    adapted(given).save_adapters(tmp_path)
    want, site = logits(given), given.model.layers[0].self_attn.q_proj
    before = type(site), list(vars(site)), list(site._load_state_dict_pre_hooks)
    seen = []

    def fail(*_: object) -> None:
        seen.append(base_of(type(site)))
        raise RuntimeError("later")

    monkeypatch.setattr(compile_module, "make_root", fail)
    spec = f'lora 1 adapter one {{ weights = "{tmp_path / "one"}" }} {INTO % "one"}'
    with pytest.raises(RuntimeError, match="later"):
        lora_fx.compile(given, spec, backend=None, inplace=True)
    assert seen == [nn.Linear]
    assert (type(site), list(vars(site)), list(site._load_state_dict_pre_hooks)) == before
    assert torch.equal(logits(given), want)


def test_what_is_trained_on_the_merged_base_under_inductor(tmp_path: Path) -> None:
    given = nf4(base())
    adapted(given).save_adapters(tmp_path)
    spec = f"""lora 1 adapter one {{ weights = "{tmp_path / "one"}" }} {INTO % "one"}
    adapter new {{ rank = 2 init = random target q_proj, down_proj }}"""
    marked, compiled = (lora_fx.compile(given, spec, backend=b) for b in (None, "inductor"))
    want = step(marked, tokens())
    assert_equal(step(compiled, tokens()), want)
    assert relative(step(adapted(given, SITES, "new"), tokens())["loss"], want["loss"]) > 1e-3
