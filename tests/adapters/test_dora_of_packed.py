"""DoRA over weights in 4 and 8 bits: as PEFT, as dense weights, in files, and what it keeps."""

import copy
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.peft.keys import live_tensors
from lora_fx.adapters.sites.magnitudes import effective_delta
from lora_fx.graph.packed import packed_linear, packed_rows
from lora_fx.graph.packing import Packing
from lora_fx.plan.packed import packed_tensors, packing_of, unpacked
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.quantised import fp4, int8, nf4
from tests.tiny import assert_differ, assert_equal, llama, step, tokens

Quantise = Callable[[nn.Module], nn.Module]
BASES: dict[str, tuple[Quantise, str]] = {
    "nf4, double": (nf4, "is_loaded_in_4bit"),
    "nf4": (lambda model: nf4(model, compress_statistics=False), "is_loaded_in_4bit"),
    "fp4": (fp4, "is_loaded_in_4bit"),
    "int8": (int8, "is_loaded_in_8bit"),
}
BACKENDS = [None, "eager", pytest.param("inductor", marks=pytest.mark.slow)]
TWO = ("nf4, double", "int8")
DORA = """lora 1
adapter default {{ rank = 3  alpha = 5  init = random  variant = dora  {more}
  target q_proj, up_proj, down_proj }}"""
BIASED = {"attention_bias": True}


def base(name: str) -> nn.Module:
    quantise, flag = BASES[name]
    model = llama(2, **BIASED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.normal_(std=0.1)
    model = quantise(model)
    setattr(model, flag, True)
    return model


def ours(name: str, backend: str | None, more: str = "") -> nn.Module:
    model = lora_fx.compile(base(name), DORA.format(more=more), backend=backend)
    scatter(model)
    return model


def theirs(name: str, model: nn.Module, dropout: float = 0.0) -> PeftModel:
    """PEFT's model with the tensors of ours."""
    targets = ["q_proj", "up_proj", "down_proj"]
    settings = {"target_modules": targets, "r": 3, "lora_alpha": 5, "lora_dropout": dropout}
    peft = get_peft_model(base(name), LoraConfig(use_dora=True, **settings))
    state = {f"base_model.model.{n}": t for n, t in live_tensors(model, "default").items()}
    loaded = set_peft_model_state_dict(peft, state)
    assert not loaded.unexpected_keys
    return peft


def renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ((n.removeprefix("base_model.model."), t) for n, t in found.items())
    return {n.replace("magnitude_vector.default.weight", "magnitude"): t for n, t in names}


def own(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("magnitude_vector.default.weight", "magnitude"): t for n, t in found.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((n, None) for n in BASES), *((n, b) for n in TWO for b in ("eager", "inductor"))],
)
def test_it_is_pefts(name: str, backend: str | None) -> None:
    model = ours(name, backend)
    want = renamed(step(theirs(name, model), tokens()))
    got = own(step(model, tokens()))
    assert sum("magnitude" in n for n in got) == 6
    assert_equal(got, want, 1e-5 if name != "int8" else 1e-4)
    plain = lora_fx.compile(base(name), DORA.format(more="").replace("dora", "lora"), backend=None)
    scatter(plain)
    other = own(step(plain, tokens()))
    assert_differ([other[n] for n in other], [got[n] for n in other])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
@pytest.mark.parametrize("name", TWO)
def test_with_dropout(name: str, backend: str | None) -> None:
    """What is dropped is the same as PEFT's where nothing is compiled: compare with that then."""
    model = ours(name, None, "dropout = 0.3").train()
    torch.manual_seed(5)
    want = own(step(model, tokens()))
    if backend is None:
        peft = theirs(name, model, 0.3).train()
        torch.manual_seed(5)
        assert_equal(want, renamed(step(peft, tokens())), 1e-5 if name != "int8" else 1e-4)
        return
    model = ours(name, backend, "dropout = 0.3").train()
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(5)
        assert_equal(own(step(model, tokens())), want, 1e-5 if name != "int8" else 1e-4)
        assert_differ([step(model, tokens())["loss"] - 4.6], [want["loss"] - 4.6])


@pytest.mark.parametrize("name", BASES)
def test_the_layer_alone_is_a_dense_one(name: str) -> None:
    """In float64 over the unpacked weight; 8 bits round the input too."""
    site = ours(name, None).model.layers[1].self_attn.q_proj.eval()
    A, B, m = (t.double() for t in storage.tensors(site, "default").values())
    W = unpacked(site).double()
    V = W + site.lora_arithmetic["default"].scaling * B @ A
    x = torch.randn(5, 3, site.in_features)
    want = x.double() @ (V * (m / V.norm(dim=1))[:, None]).T + site.bias.double()
    lora = x.double() @ V.T + site.bias.double()
    assert relative(site(x), want) < (2e-2 if name == "int8" else 2e-6)
    assert relative(lora, want) > 1e-1
    assert relative(effective_delta(site, "default"), V * (m / V.norm(dim=1))[:, None] - W) < 2e-6


@pytest.mark.parametrize("name", BASES)
def test_it_starts_as_the_base(name: str) -> None:
    text = DORA.format(more="").replace("init = random", "")
    model = lora_fx.compile(base(name), text, backend=None)
    with torch.no_grad():
        got = model(tokens()).logits
        with model.disable_adapter():
            assert relative(got, model(tokens()).logits) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TWO)
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    """In training mode: outside it, bitsandbytes may repack the base's own layers."""
    model = ours(name, None).train()
    want = model(tokens()).logits
    model.save_adapters(tmp_path / "ours")
    peft = PeftModel.from_pretrained(base(name), tmp_path / "ours").train()
    assert relative(peft(tokens()).logits, want) < 1e-5
    peft.save_pretrained(tmp_path / "theirs")
    there, here = (
        load_file(tmp_path / p / "adapter_model.safetensors") for p in ("theirs", "ours")
    )
    assert there.keys() == here.keys()
    again = lora_fx.load(tmp_path / "theirs", base(name), backend=None)
    assert torch.equal(again(tokens()).logits, want)
    assert relative(base(name).train()(tokens()).logits, want) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_unpacked_weight_is_kept_for_the_backward_pass(backend: str | None) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 352}
    model = nf4(llama(1, **sizes))
    text = DORA.format(more="dropout = 0.1")
    model = lora_fx.compile(model, text, backend=backend)
    scatter(model)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    ids = tokens(1, 3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    elements = 64 * 352
    whole = [t for t in kept if t.is_floating_point() and t.numel() >= elements]
    assert not whole
    assert any(t.dtype is torch.uint8 and t.numel() == elements // 2 for t in kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_batch_of_dora_and_lora(backend: str | None) -> None:
    text = """lora 1
    adapter a { rank = 3  alpha = 5  init = random  variant = dora  target q_proj, up_proj }
    adapter b { rank = 2  init = random  target q_proj, down_proj }
    route { train = true }"""
    model = lora_fx.compile(base("nf4, double"), text, backend=backend)
    scatter(model, "a")
    scatter(model, "b")
    names = ["b", "a", "__base__"]
    mixed = model(tokens(), adapter_names=names).logits
    for i, name in enumerate(names):
        alone = model(tokens()[i : i + 1], adapter_names=[name]).logits
        assert relative(mixed[i : i + 1], alone) < 1e-5
    assert relative(mixed[0], mixed[1]) > 1e-1


@pytest.mark.parametrize("shape", [(7, 6), (192, 64), (33, 100), (5, 512)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_rows_are_unpacked_as_bitsandbytes_unpacks_all(
    shape: tuple[int, int], kind: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_fx.graph.packing._AT_ONCE", 512)
    weight = torch.randn(shape)
    settings = {"quant_type": kind, "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, **settings)
    layer.weight = bnb.nn.Params4bit(weight, module=layer, **settings)
    layer.to("cpu")
    want = dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(unpacked(layer), want)
    assert relative(want, weight) < 0.2


def test_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_fx.graph.packing._AT_ONCE", 1024)
    model = base("nf4, double").model.layers[0].mlp.up_proj
    how, tensors = packing_of(model), packed_tensors(model)
    assert Packing.parse(str(how)) == how
    W = unpacked(model)
    A = torch.randn(3, W.shape[1])
    norms, products = packed_rows(tensors, A, str(how))
    assert relative(norms, W.norm(dim=1)) < 1e-6
    assert relative(products, W @ A.T) < 1e-6
    x = torch.randn(2, 5, W.shape[1], requires_grad=True)
    y = packed_linear(x, tensors, str(how))
    assert relative(y, x @ W.T) < 1e-6
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative(dx, dy @ W) < 1e-6
    example = (x, tensors, str(how))
    torch.library.opcheck(packed_linear, example)
    torch.library.opcheck(packed_rows, (tensors, A, str(how)))


def test_a_copy_has_weights_of_its_own() -> None:
    model = ours("int8", None).eval()
    want = model(tokens()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()).logits, want)
