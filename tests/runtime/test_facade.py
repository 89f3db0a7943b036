"""The compiled model is the Hugging Face model it was made from."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

import lora_fx
from tests.dense import relative
from tests.runtime.trainer import base
from tests.tiny import generate, llama, spec, tokens

TWO = spec() + "adapter two { rank = 2 init = random seed = 4 target q_proj }"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return lora_fx.compile(base(), TWO, backend="eager").eval()


def test_it_is_an_instance_of_its_class(model: nn.Module) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model).__module__ == LlamaForCausalLM.__module__
    given = inspect.signature(base().forward).parameters
    shown = inspect.signature(model.forward).parameters
    assert dict(given) == {name: shown[name] for name in given}
    assert shown.keys() - given.keys() == {
        "adapter_names",
        "adapter_indices",
        "invocation_starts",
    }
    assert [name for name in shown][-1] == [name for name in given][-1] == "kwargs"
    layers = zip(model.modules(), lora_fx.compile(base(), TWO, backend=None).modules(), strict=True)
    assert all(type(a).__name__ == type(b).__name__ for a, b in layers)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)


def test_the_config_it_writes_names_the_original_class(model: nn.Module, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    assert "LoraFx" not in (tmp_path / "config.json").read_text()
    assert model.config.architectures in (None, ["LlamaForCausalLM"])


def test_outputs_and_attributes(model: nn.Module) -> None:
    result = model(tokens(), use_cache=True)
    assert len(result.past_key_values.layers) == 2
    assert model.num_parameters(only_trainable=True) == sum(
        p.numel() for n, p in model.named_parameters() if "lora_" in n
    )
    assert model.get_input_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("outputs", ["hidden_states", "attentions"])
def test_recorded_outputs(outputs: str, unit: str) -> None:
    results = []
    for backend in ("eager", None):
        one = llama(3, attn_implementation="eager")
        model = lora_fx.compile(one, spec(unit), backend=backend).eval()
        results.append(model(tokens(), **{f"output_{outputs}": True})[outputs])
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
    got, want = results
    assert len(got) == len(want) >= 3
    assert all(relative(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_the_uncompiled_model(cache: str | None, model: nn.Module) -> None:
    marked = lora_fx.compile(base(), TWO, backend=None).eval()
    settings = {"cache_implementation": cache} if cache else {}
    got = generate(model, tokens(2), **settings)
    assert torch.equal(got, generate(marked, tokens(2), **settings))
    with model.disable_adapter():
        plain = generate(model, tokens(2), **settings)
    assert torch.equal(plain, generate(base().eval(), tokens(2), **settings))
    assert not torch.equal(plain, got)


def test_sampling_and_beams(model: nn.Module) -> None:
    marked = lora_fx.compile(base(), TWO, backend=None).eval()
    results = []
    for each in (model, marked):
        torch.manual_seed(5)
        mask = torch.ones_like(tokens(2))
        common = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0}
        sampled = each.generate(tokens(2), do_sample=True, **common)
        beams = each.generate(tokens(2), num_beams=3, **common)
        results.append((sampled, beams))
    (a, b), (c, d) = results
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_peft_config_describes_each_adapter(model: nn.Module) -> None:
    config = model.peft_config
    assert list(config) == ["default", "two"]
    assert (config["default"]["r"], config["two"]["target_modules"]) == (4, ["q_proj"])
    assert LoraConfig(**config["two"]).r == 2


def test_get_adapter_state_dict_is_what_is_saved(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for name, folder in (("two", tmp_path / "two"), (None, tmp_path)):
        want = load_file(folder / "adapter_model.safetensors")
        got = model.get_adapter_state_dict(name)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(lora_fx.LoraFxError, match="there is no adapter `tow`"):
        model.get_adapter_state_dict("tow")


def test_transformers_own_adapters_are_refused(model: nn.Module) -> None:
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(lora_fx.LoraFxError, match="into the spec"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert {name for name, _ in model.named_parameters()} == names


def test_only_the_main_process_writes(model: nn.Module, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_copy_is_independent(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    twin.set_adapter("two")
    assert model.active_adapters() == ["default"]
    assert model.peft_config.keys() == twin.peft_config.keys()
    twin.delete_adapter("default")
    assert list(model.peft_config) == ["default", "two"]


def test_the_base_model_is_not_a_compiled_one() -> None:
    plain = llama()
    lora_fx.compile(plain, spec(), backend=None)
    assert type(plain) is LlamaForCausalLM
    assert not PreTrainedModel._hf_peft_config_loaded


def test_chosen_adapters_are_written_alone(tmp_path: Path) -> None:
    text = "lora 1 adapter a { rank = 2 target q_proj } adapter b { rank = 3 target q_proj }"
    model: Any = lora_fx.compile(llama(1), text, backend=None)
    model.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 1
    with pytest.raises(lora_fx.LoraFxError, match="no adapter `c`"):
        model.save_pretrained(tmp_path, selected_adapters=["b", "c"])
    with pytest.raises(TypeError, match="'selected'"):
        model.save_pretrained(tmp_path, selected=["b"])
    assert all(path.read_bytes() == data for path, data in files.items())
    model.save_pretrained(tmp_path, selected_adapters=["b"], safe_serialization=True)
    changed = {path.name for path, data in files.items() if path.read_bytes() != data}
    assert changed == {"adapter_model.safetensors"}
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() in files.values()
