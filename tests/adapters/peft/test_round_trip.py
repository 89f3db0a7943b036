"""Every kind of layer goes to PEFT and comes back: the same keys and the same bytes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from tests.adapters.kinds import ours, scatter
from tests.adapters.test_kinds import KINDS
from tests.architectures import ARCHITECTURES
from tests.by_peft import step
from tests.dense import relative
from tests.example_inputs import example_inputs
from tests.tiny import llama, tokens

TENSORS = "adapter_model.safetensors"
STACKED = ("qwen3_moe", "deepseek_v3")
TASKS = {
    "bert": ("SEQ_CLS", "query, value", "classifier", ["query", "value"]),
    "distilbert": ("SEQ_CLS", "q_lin", "classifier, pre_classifier", ["q_lin"]),
    "deberta_v2": ("TOKEN_CLS", "query_proj", "classifier", ["query_proj"]),
    "roberta": ("QUESTION_ANS", "query, value", "qa_outputs", ["query", "value"]),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / TENSORS)


def assert_same_bytes(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert want
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key], tensor), key


def through_peft(base: nn.Module, folder: Path, out: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, folder)
        model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_to_peft_and_back(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    ours(kind).save_pretrained(tmp_path / "ours")
    through_peft(kind.base(), tmp_path / "ours", tmp_path / "peft")
    assert_same_bytes(tensors(tmp_path / "peft"), tensors(tmp_path / "ours"))
    for folder in ("ours", "peft"):
        again = lora_fx.load(tmp_path / folder, base=kind.base(), backend=None)
        again.save_pretrained(tmp_path / f"{folder} again")
        assert_same_bytes(tensors(tmp_path / f"{folder} again"), tensors(tmp_path / "ours"))
    scatter(again)
    again.save_pretrained(tmp_path / "moved")
    with pytest.raises(AssertionError):
        assert_same_bytes(tensors(tmp_path / "moved"), tensors(tmp_path / "ours"))


def test_dropout_beside_an_embedding_which_has_none(tmp_path: Path) -> None:
    """PEFT has one for the adapter, and leaves it out at embeddings."""
    text = """lora 1 adapter default { rank = 3  alpha = 5  init = random
    target q_proj { dropout = 0.25 }  target embed_tokens, v_proj }"""
    model = lora_fx.compile(llama(2), text, backend=None)
    model.save_pretrained(tmp_path / "ours")
    theirs = through_peft(llama(2), tmp_path / "ours", tmp_path / "peft")
    for folder, of_v_proj in (("ours", 0), ("peft", 0.25)):
        again: Any = lora_fx.load(tmp_path / folder, base=llama(2), backend=None)
        inner = again.model
        dropped = [inner.embed_tokens, inner.layers[1].self_attn.v_proj]
        dropped.append(inner.layers[1].self_attn.q_proj)
        found = [site.lora_arithmetic["default"].dropout for site in dropped]
        assert found == [0, of_v_proj, 0.25]
        assert relative(again.eval()(tokens()).logits, theirs(tokens()).logits) < 1e-5


@pytest.mark.parametrize("name", STACKED)
def test_single_layers_beside_stacked_experts(name: str, tmp_path: Path) -> None:
    """Of the names that the experts had before they were stacked."""
    text = "lora 1 adapter default { rank = 3  init = random  target linear }"
    model = lora_fx.compile(ARCHITECTURES[name]().eval(), text, backend=None)
    model.save_pretrained(tmp_path / "ours")
    assert any(".gate_proj.lora_A" in key for key in tensors(tmp_path / "ours"))
    again = lora_fx.load(tmp_path / "ours", base=ARCHITECTURES[name]().eval(), backend=None)
    again.save_pretrained(tmp_path / "again")
    assert_same_bytes(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
    inputs = example_inputs(model)
    assert relative(again(**inputs).logits, model(**inputs).logits) < 1e-6
    with model.disable_adapter():
        assert relative(again(**inputs).logits, model(**inputs).logits) > 1e-3


@pytest.mark.parametrize("name", TASKS)
def test_heads_of_tasks(name: str, tmp_path: Path) -> None:
    task, target, head, targets = TASKS[name]
    text = f"lora 1 adapter default {{ rank = 3  init = random  target {target}  train {head} }}"
    model = lora_fx.compile(ARCHITECTURES[name]().eval(), text, backend=None)
    scatter(model)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == task
    through_peft(ARCHITECTURES[name](), tmp_path / "ours", tmp_path / "peft")
    assert_same_bytes(tensors(tmp_path / "peft"), tensors(tmp_path / "ours"))
    config = LoraConfig(r=3, target_modules=targets, task_type=task, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(ARCHITECTURES[name]().eval(), config).eval()
        theirs.save_pretrained(tmp_path / "theirs")
    read = lora_fx.load(
        tmp_path / "theirs", base=ARCHITECTURES[name]().eval(), backend=None, is_trainable=True
    )
    read.save_pretrained(tmp_path / "written")
    assert_same_bytes(tensors(tmp_path / "written"), tensors(tmp_path / "theirs"))
    inputs = example_inputs(read)
    for part in ("loss", *(key for key in read(**inputs) if key.endswith("logits"))):
        got, want = (m(**inputs)[part] for m in (read, theirs))
        assert torch.allclose(got, want, atol=1e-6), part
    trained = {n for n, p in read.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in theirs.parameters())
    assert step(read, inputs).keys() >= trained


@pytest.mark.parametrize("name", TASKS)
def test_no_task_without_its_head(name: str, tmp_path: Path) -> None:
    """PEFT would look for the head's tensors in the folder."""
    _, target, _, _ = TASKS[name]
    text = f"lora 1 adapter default {{ rank = 3  init = random  target {target} }}"
    model = lora_fx.compile(ARCHITECTURES[name]().eval(), text, backend=None)
    scatter(model)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] is None
    theirs = through_peft(ARCHITECTURES[name]().eval(), tmp_path / "ours", tmp_path / "peft")
    assert_same_bytes(tensors(tmp_path / "peft"), tensors(tmp_path / "ours"))
    inputs = example_inputs(model)
    _, want, *_ = theirs(**inputs).values()
    _, got, *_ = model(**inputs).values()
    assert relative(got, want) < 1e-5
    with model.disable_adapter():
        _, plain, *_ = model(**inputs).values()
    assert relative(plain, want) > 1e-4


def named(name: str) -> nn.Module:
    model = ARCHITECTURES[name]()
    model.config._name_or_path = model.name_or_path = "someone/their-model"
    return model


def test_the_card_says_what_that_of_peft_says(tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 3 init = random target q_proj }"
    lora_fx.compile(named("llama"), text, backend=None).save_pretrained(tmp_path / "ours")
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(named("llama"), config).save_pretrained(
            tmp_path / "theirs", save_embedding_layers=False
        )
    got, want = (ModelCard.load(tmp_path / f / "README.md") for f in ("ours", "theirs"))
    assert got.data.to_dict() == want.data.to_dict()
    assert got.data.base_model == "someone/their-model"
    assert "someone/their-model" in got.text


def test_a_card_that_is_there_keeps_its_text(tmp_path: Path) -> None:
    text = "lora 1 adapter default { rank = 3 init = random target q_proj }"
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n")
    model = lora_fx.compile(named("llama"), text, backend=None)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# Mine"
    assert card.data.license == "mit"
    assert set(card.data.tags) > {"mine", "lora"}


def test_a_folder_of_this_machine_is_not_named(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]()
    model.config._name_or_path = str(tmp_path)
    text = "lora 1 adapter default { rank = 3 init = random target q_proj }"
    lora_fx.compile(model, text, backend=None).save_pretrained(tmp_path / "ours")
    written = (tmp_path / "ours/README.md").read_text()
    assert str(tmp_path) not in written
    assert ModelCard(written).data.base_model is None
