"""`quantize`: what transformers packs, bit for bit; inits on whole weights; what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_fx
from lora_fx.plan.packed import packing_of, unpacked
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.quantised import nf4
from tests.tiny import assert_equal, llama, step, tokens

FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
METHODS = {
    "nf4(double_quant = true)": FOUR | {"bnb_4bit_use_double_quant": True},
    "nf4": FOUR,
    "fp4(double_quant = true)": {**FOUR, "bnb_4bit_quant_type": "fp4"}
    | {"bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
ADAPTER = "rank = 3  alpha = 5  init = random  target q_proj, up_proj"


def text(method: str = "nf4", adapter: str = ADAPTER, more: str = "") -> str:
    return f"""lora 1
    adapter default {{ {adapter} }}
    quantize linear {{ method = {method} {more} }}"""


def compiled(base: nn.Module, spec: str, backend: str | None = None) -> nn.Module:
    return lora_fx.compile(base, spec, backend=backend).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_transformers_loads(method: str, variant: str, tmp_path: Path) -> None:
    base = llama(2, attention_bias=True)
    base.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**METHODS[method])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    adapter = f"{ADAPTER}  variant = {variant}"
    before = {n: p.clone() for n, p in base.named_parameters()}
    ours = compiled(base, text(method, adapter))
    for name, want in theirs.named_parameters():
        got = ours.get_parameter(name)
        assert (type(got), got.dtype) == (type(want), want.dtype)
        assert torch.equal(got.data, want.data), name
    for name, module in theirs.named_modules():
        if packing_of(module) is not None:
            assert packing_of(ours.get_submodule(name)) == packing_of(module)
            assert torch.equal(unpacked(ours.get_submodule(name)), unpacked(module))
    same = compiled(theirs, f"lora 1 adapter default {{ {adapter} }}")
    assert_equal(step(ours, tokens()), step(same, tokens()), 0.0)
    assert type(base.model.layers[0].mlp.up_proj) is nn.Linear
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    whole = compiled(base, f"lora 1 adapter default {{ {adapter} }}")
    assert relative(ours(tokens()).logits, whole(tokens()).logits) > 1e-3
    assert ours.config.quantization_config.load_in_4bit == ("load_in_4bit" in METHODS[method])
    assert not hasattr(base.config, "quantization_config")


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_rewritten_it_computes_the_same(method: str) -> None:
    adapter = f"{ADAPTER}  variant = dora"
    want = step(compiled(llama(2), text(method, adapter)), tokens())
    assert_equal(step(compiled(llama(2), text(method, adapter), "eager"), tokens()), want)


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    want = step(compiled(llama(2), text()), tokens())
    assert_equal(step(compiled(llama(2), text(), "inductor"), tokens()), want)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_the_storage(storage: str) -> None:
    model = compiled(
        llama(1), text(more=f"storage = {storage}", adapter=f"{ADAPTER} variant = dora")
    )
    assert str(model.model.layers[0].mlp.up_proj.weight.dtype) == f"torch.{storage}"
    assert torch.equal(
        model(tokens()).logits,
        compiled(llama(1), text(adapter=f"{ADAPTER} variant = dora"))(tokens()).logits,
    )


CHANGING = {
    "pissa": "init = pissa",
    "olora": "init = olora",
    "loftq": "init = loftq(bits = 4)",
    "kasa": "variant = kasa",
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_an_init_leaves_is_packed(name: str, tmp_path: Path) -> None:
    base = llama(1, hidden_size=64, intermediate_size=128)
    adapter = f"rank = 4  target q_proj, up_proj  {CHANGING[name]}"
    model = compiled(base, text(adapter=adapter))
    whole = compiled(base, f"lora 1 adapter default {{ {adapter} }}")
    site, dense = (m.model.layers[0].mlp.up_proj for m in (model, whole))
    with torch.no_grad():
        left = nn.Linear(64, 128, bias=False)
        left.weight.copy_(dense.weight)
        packed = nf4(nn.Sequential(left), compress_statistics=False)
    assert torch.equal(site.weight.data, packed[0].weight.data)
    assert torch.equal(unpacked(site), dense.weight) == (name == "loftq")
    scatter(model)
    lora_fx.build(text(adapter=adapter), base, tmp_path / "artifact")
    model = compiled(base, text(adapter=adapter))
    again = lora_fx.load(tmp_path / "artifact", base, backend=None).train()
    for parameter, want in model.named_parameters():
        assert torch.equal(again.get_parameter(parameter), want), parameter
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with model.disable_adapter():
        assert relative(model(tokens()).logits, base(tokens()).logits) < 0.2
    site = model.model.layers[0].mlp.up_proj
    model.delete_adapter("default")
    assert packing_of(site) is not None
    assert relative(unpacked(site), base.model.layers[0].mlp.up_proj.weight) < 0.2


def test_layers_that_share_a_weight_share_the_packed_one() -> None:
    spec = f"""lora 1
    layers {{ replicate 0..2, 1..2 }}
    adapter default {{ {ADAPTER} }}
    quantize linear {{ method = nf4 }}"""
    model = compiled(llama(2), spec)
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (1, 2))
    assert first.data_ptr() == second.data_ptr()
    assert model(tokens()).logits.isfinite().all()


def refused(spec: str, base: nn.Module) -> str:
    with pytest.raises(lora_fx.LoraFxError) as error:
        lora_fx.compile(base, spec, backend=None)
    return str(error.value)


def test_what_is_quantised_already() -> None:
    base = nf4(llama(1))
    weight = base.model.layers[0].mlp.up_proj.weight
    model = compiled(base, text("nf4(double_quant = true)"))
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == weight.data_ptr()
    message = refused(text("nf4"), base)
    assert "quantised already cannot be quantised otherwise" in message
    assert "nf4(double_quant = true) in uint8" in message
    assert "quantised otherwise" in refused(text("int8"), base)


def test_refused_at_its_line() -> None:
    tied = llama(1, tie_word_embeddings=True)
    head = 'lora 1 adapter default { target q_proj } quantize "lm_head" { method = nf4 }'
    assert "also `model.embed_tokens`'s" in refused(head, tied)
    assert "is float64" in refused(text(), llama(1).double())
    trained = text(adapter=f"{ADAPTER}  train down_proj")
    assert "cannot be trained itself" in refused(trained, llama(1))
    parameter = text(adapter='target parameter "**.up_proj.weight"')
    assert "adapted as a parameter" in refused(parameter, llama(1))
    loftq = text("nf4(double_quant = true)", "init = loftq(bits = 4)  target q_proj")
    assert "only `nf4` packs" in refused(loftq, llama(1))
    changing = "lora 1 adapter default { init = pissa  target q_proj }"
    assert "write `quantize`" in refused(changing, nf4(llama(1)))


def test_mica_looks_at_what_is_packed() -> None:
    base = nf4(llama(1))
    model = compiled(base, "lora 1 adapter default { rank = 2  init = mica  target up_proj }")
    site = model.model.layers[0].mlp.up_proj
    B: Tensor = site.lora_B["default"].weight
    U, _, _ = torch.linalg.svd(unpacked(site), full_matrices=False)
    assert relative((B.T @ U[:, -2:]).abs(), torch.eye(2)) < 1e-4


def test_the_plan_counts_what_is_packed() -> None:
    whole, packed = llama(2), text("nf4(double_quant = true)")
    plan = lora_fx.plan(packed, whole)
    other = lora_fx.plan(packed.split("quantize")[0], whole)
    assert plan.memory()["base"] < other.memory()["base"]
    assert plan.memory()["adapters"] == other.memory()["adapters"]
    assert plan.memory()["base"] == lora_fx.plan(packed, nf4(llama(2))).memory()["base"]
