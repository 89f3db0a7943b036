import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, LlamaConfig, ViTConfig

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.skeleton import build_on_meta, tree_of
from lora_fx.spec import parse
from tests.tiny import SIZES, llama

TEXT = "lora 1 adapter x { rank = 2 target linear }"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = llama(2).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_config_is_enough(folder: Path) -> None:
    live = lora_fx.plan(TEXT, llama(2))
    config = LlamaConfig.from_pretrained(folder)
    for model in (config, folder, str(folder), folder / "config.json"):
        assert lora_fx.plan(TEXT, model).to_json() == live.to_json()


def test_the_model_that_the_spec_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = lora_fx.plan(TEXT, folder).to_json()["sites"]
    spec = folder.parent / "a.lora"
    spec.write_text(TEXT.replace("lora 1", 'lora 1 model "model"'))
    found = [site["fqn"] for site in lora_fx.plan(spec).to_json()["sites"]]
    assert found == [site["fqn"] for site in want]
    monkeypatch.chdir(folder.parent)
    assert len(lora_fx.plan(spec.read_text()).sites) == len(want)


def test_the_path_is_relative_to_the_file_that_names_it(folder: Path) -> None:
    (folder / "part.lora").write_text('lora 1 model "."')
    spec = folder.parent / "a.lora"
    spec.write_text(TEXT.replace("lora 1", 'lora 1 include "model/part.lora"'))
    assert len(lora_fx.plan(spec).sites) == 14


def test_no_model() -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(TEXT)
    assert [d.code for d in raised.value.diagnostics] == ["no-model"]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": "unheard of"}'])
def test_folders_without_a_config(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(TEXT, tmp_path)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "no-model"
    assert diagnostic.notes


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "none/config.json", "~/none"])
def test_paths_that_do_not_exist_are_not_asked_for_at_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(TEXT, name)
    assert raised.value.diagnostics[0].message == f"`{name}` does not exist"


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(TEXT, "no-such-organisation/no-such-model")
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "no-model"
    assert "no-such-organisation/no-such-model" in diagnostic.message
    assert diagnostic.notes


def test_the_fault_is_at_the_model_statement(tmp_path: Path) -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(TEXT.replace("lora 1", f'lora 1 model "{tmp_path}"'))
    span = raised.value.diagnostics[0].span
    assert span is not None
    assert span.text.startswith("model ")


def test_the_class_that_is_built() -> None:
    assert type(build_on_meta(LlamaConfig(**SIZES))).__name__ == "LlamaForCausalLM"
    assert (
        type(build_on_meta(ViTConfig(hidden_size=12, num_attention_heads=2))).__name__ == "ViTModel"
    )
    bert = BertConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=1)
    bert.architectures = ["BertForSequenceClassification"]
    assert type(build_on_meta(bert)).__name__ == "BertForSequenceClassification"


def test_the_dtype_that_sizes_are_in() -> None:
    config = LlamaConfig(num_hidden_layers=1, **SIZES)
    for statement, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        spec = parse(f'lora 1 model "x" {{ dtype = {statement} }}')
        tree = tree_of(config, spec)
        assert {p.dtype for p in tree.parameters()} == {dtype}
        assert {p.device.type for p in tree.parameters()} == {"meta"}
    config.dtype = torch.float16
    assert {p.dtype for p in build_on_meta(config).parameters()} == {torch.float16}
    assert torch.get_default_dtype() == torch.float32


def test_the_given_config_is_unchanged() -> None:
    config = LlamaConfig(num_hidden_layers=3, **SIZES)
    before = json.dumps(config.to_dict(), default=str)
    lora_fx.plan("lora 1 layers { replicate 0..3, 0..3 } adapter x { target linear }", config)
    assert json.dumps(config.to_dict(), default=str) == before


def test_seventy_billion_parameters_take_seconds() -> None:
    config = LlamaConfig(
        num_hidden_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    start = time.monotonic()
    plan = lora_fx.plan("lora 1 adapter x { rank = 16 target linear }", config)
    assert time.monotonic() - start < 10
    assert len(plan.sites) == 560
    assert plan.all == 69_183_741_952
