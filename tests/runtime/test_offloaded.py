"""Bases whose weights accelerate keeps on the CPU or on a disk compute and save the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lora_fx
from lora_fx.diagnostics import LoraFxError, render
from lora_fx.plan.offloaded import weight_stores
from tests.dense import relative
from tests.golden import assert_golden
from tests.runtime.trainer import loss, trainer
from tests.tiny import assert_equal, generate, llama, spec, step, tokens

HERE = Path(__file__).parents[1] / "diagnostics" / "model"
EVERYTHING = """lora 1
adapter default {
  rank = 3
  init = random
  bias = lora_only
  tie  = true
  target linear, embed_tokens
  train "model.norm", "model.layers.1.input_layernorm"
}
adapter rows { init = random target q_proj tokens [3, 7] }
"""


LAYERS = """lora 1
adapter default {
  rank = 3
  init = random
  target linear
  target q_proj, down_proj { variant = dora }
  train "model.norm", "model.layers.1.input_layernorm"
}
"""


def base() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True, attention_bias=True)


def on_cpu(model: nn.Module, _: Path) -> nn.Module:
    return cpu_offload(model, "cpu")  # as a device it would collect garbage each time


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, folder, "cpu", offload_buffers=True)


def in_part(model: nn.Module, folder: Path) -> nn.Module:
    device_map = {name: "cpu" for name in ("model.rotary_emb", "model.norm", "model.layers.0")}
    device_map |= {name: "disk" for name in ("model.embed_tokens", "lm_head")}
    device_map |= {name: "disk" for name in ("model.layers.1",)}
    return dispatch_model(model, device_map, offload_dir=folder)


def by_transformers(model: LlamaForCausalLM, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    device_map |= {"model.layers.1": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=folder / "offload", dtype=model.dtype
    )
    loaded.config._name_or_path = ""
    return loaded.train()


Offload = Callable[[nn.Module, Path], nn.Module]


def on_meta(model: nn.Module) -> set[str]:
    """Names of parameters that are not there now."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.device.type == "meta"}


@pytest.mark.parametrize(
    ("offload", "text", "backend", "inplace"),
    [
        (on_cpu, EVERYTHING, None, True),
        (on_disk, EVERYTHING, None, True),
        (in_part, EVERYTHING, None, False),
        (by_transformers, EVERYTHING, None, False),
        (on_cpu, LAYERS, "eager", False),
        pytest.param(by_transformers, LAYERS, "inductor", True, marks=pytest.mark.slow),
    ],
)
def test_it_computes_and_saves_the_same(
    offload: Offload, text: str, backend: Any, inplace: bool, tmp_path: Path
) -> None:
    plain = lora_fx.compile(base(), text, backend=backend)
    given = offload(base(), tmp_path / "weights")
    away = on_meta(given)
    model = lora_fx.compile(given, text, backend=backend, inplace=inplace)
    assert (model is given) == inplace
    for adapter in plain.lora_fx_adapters:
        plain.set_adapter(adapter), model.set_adapter(adapter)
        assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)
        assert torch.equal(generate(model, tokens()), generate(plain, tokens()))
    with model.disable_adapter():
        assert relative(model(tokens()).logits, base()(tokens()).logits) < 1e-6
        assert away <= on_meta(model)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == files(tmp_path / "plain")


def files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_the_given_model_shares_its_store_and_stays_as_it_was(tmp_path: Path) -> None:
    given = in_part(base(), tmp_path)
    before = given(tokens()).logits
    model = lora_fx.compile(given, EVERYTHING, backend=None)
    step(model, tokens())
    assert weight_stores(model)
    for ours, theirs in zip(weight_stores(model), weight_stores(given), strict=True):
        assert ours is theirs
    assert torch.equal(given(tokens()).logits, before)
    with pytest.raises(NotImplementedError, match="meta"):
        model.to("cpu", torch.float64)
    assert given.model.layers[0].mlp.up_proj.weight.dtype is torch.float32


@pytest.mark.parametrize("offload", [on_cpu, by_transformers])
def test_a_folder_is_loaded(offload: Offload, tmp_path: Path) -> None:
    lora_fx.compile(base(), EVERYTHING, backend=None).save_pretrained(tmp_path / "saved")
    plain = lora_fx.load(tmp_path / "saved", base(), backend=None, is_trainable=True)
    given = offload(base(), tmp_path / "weights")
    model = lora_fx.load(tmp_path / "saved", given, backend=None, is_trainable=True)
    for adapter in ("default", "rows"):
        plain.set_adapter(adapter), model.set_adapter(adapter)
        assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)
    model.delete_adapter("default")
    model.load_adapter(tmp_path / "saved", "default", is_trainable=True)
    model.set_adapter("default"), plain.set_adapter("default")
    assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)


def test_hooks_may_be_removed_again(tmp_path: Path) -> None:
    plain = lora_fx.compile(base(), EVERYTHING, backend=None)
    model = lora_fx.compile(on_disk(base(), tmp_path), EVERYTHING, backend=None)
    step(model, tokens())
    remove_hook_from_submodules(model)
    assert not on_meta(model)
    for adapter in ("rows", "default"):
        model.set_adapter(adapter), plain.set_adapter(adapter)
        assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, base()(tokens()).logits)


def test_a_model_whose_hooks_were_removed(tmp_path: Path) -> None:
    given = on_cpu(base(), tmp_path)
    remove_hook_from_submodules(given)
    assert "forward" in vars(given.model.layers[0].mlp.up_proj)
    plain, model = (lora_fx.compile(m, LAYERS, backend="eager") for m in (base(), given))
    assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)


@pytest.mark.parametrize("inplace", [True, False])
def test_repeated_layers_that_are_recomputed(inplace: bool, tmp_path: Path) -> None:
    text = LAYERS + "layers { replicate 0..2, 0..2 } compile { checkpoint = layers }"
    plain = lora_fx.compile(base(), text, backend="eager")
    given = by_transformers(base(), tmp_path)
    model = lora_fx.compile(given, text, backend="eager", inplace=inplace)
    assert len(model.model.layers) == 4
    assert_equal(step(model, tokens()), step(plain, tokens()), 2e-6)
    stores = {id(store) for store in weight_stores(model)}
    assert stores == {id(store) for store in weight_stores(given)}


def test_a_layer_is_captured(tmp_path: Path) -> None:
    plain = lora_fx.compile(base(), LAYERS)
    model = lora_fx.compile(on_disk(base(), tmp_path), LAYERS)
    texts = [
        lora_fx.capture(m, layer=1, input_ids=tokens()).text("lowered") for m in (model, plain)
    ]
    assert texts[0] == texts[1]


def test_trainer(tmp_path: Path) -> None:
    model = lora_fx.compile(by_transformers(base(), tmp_path / "weights"), LAYERS, backend="eager")
    run = trainer(model, tmp_path / "run", max_steps=12)
    first = loss(run)
    run.train()
    assert loss(run) < 0.99 * first
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = lora_fx.compile(base().to(dtype), EVERYTHING, backend=None)
    given = on_disk(base().to(dtype), tmp_path)
    model = lora_fx.compile(given, EVERYTHING, backend=None)
    got, want = step(model, tokens()), step(plain, tokens())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n} == {torch.float32}
    assert model.model.norm.weight.dtype is dtype


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    plan, offloaded = (lora_fx.plan(LAYERS, m) for m in (base(), in_part(base(), tmp_path)))
    assert (offloaded.all, offloaded.memory()) == (plan.all, plan.memory())


def test_preloaded_classes_are_refused() -> None:
    given = cpu_offload(llama(2), preload_module_classes=["LlamaAttention"])
    with pytest.raises(LoraFxError) as raised:
        lora_fx.compile(given, spec(), backend=None)
    golden = HERE / "hook-in-the-way-preloaded.expect"
    assert_golden(golden, render(raised.value.diagnostics))
    assert torch.equal(given(tokens()).logits, llama(2)(tokens()).logits)
