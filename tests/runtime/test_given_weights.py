"""`weights = "folder"`: the values of a folder, at what the spec plans or the folder says."""

import json
from pathlib import Path

import pytest
import torch

import lora_fx
from lora_fx.diagnostics import LoraFxError, render
from tests.adapters.peft.both import peft_model
from tests.dense import relative
from tests.golden import assert_golden
from tests.tiny import llama, tokens

SETTINGS = {
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["model.norm"],
    "trainable_token_indices": [3, 4],
}
SAME = 'rank = 3  alpha = 5  target q_proj, down_proj  train "model.norm"  tokens [3, 4]'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = peft_model(**SETTINGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.3)
    model.save_pretrained(tmp_path / "sql")
    return tmp_path


def compiled(adapter: str, more: str = "") -> torch.nn.Module:
    text = f'lora 1\nadapter a {{ weights = "sql"  {adapter} }}\n{more}'
    Path("main.lora").write_text(text)
    return lora_fx.compile(llama(4), "main.lora", backend=None)


@pytest.mark.parametrize("adapter", ["", SAME])
def test_it_is_the_adapter_of_the_folder(folder: Path, adapter: str) -> None:
    model, loaded = compiled(adapter), lora_fx.load(folder / "sql", llama(4), backend=None)
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)
    assert relative(model(tokens()).logits, llama(4)(tokens()).logits) > 1e-2
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_is_trained_if_the_spec_says_so(folder: Path) -> None:
    model = compiled("trainable = true", "adapter b { target o_proj }")
    names = {n.partition(".lora_")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names >= {"A.a.weight", "B.a.weight", "tokens.a.weight", "A.b.weight"}


def test_an_explicit_scaling_wins(folder: Path) -> None:
    model = compiled(SAME.replace("alpha = 5", "alpha = 0"))
    sites = [m for m in model.modules() if hasattr(m, "lora_scalings")]
    assert sites
    assert not any(site.lora_scalings.any() for site in sites)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("weights-differ", SAME.replace("rank = 3", "rank = 2")),
        ("weights-differ-modules", SAME.replace("down_proj", "up_proj")),
        ("weights-differ-scaling", SAME.replace("alpha = 5", "")),
    ],
)
def test_a_folder_that_does_not_fit(folder: Path, name: str, adapter: str) -> None:
    with pytest.raises(LoraFxError) as raised:
        compiled(adapter)
    text = render(raised.value.diagnostics)
    golden = Path(__file__).parents[1] / "diagnostics" / "model" / f"{name}.expect"
    assert_golden(golden, text)


def test_faults_of_the_folder_name_the_line(folder: Path) -> None:
    path = folder / "sql" / "adapter_config.json"
    more = {"velora_config": {"num_groups": 4}, "init_lora_weights": "pissa"}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    with pytest.raises(LoraFxError) as raised:
        compiled(SAME)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "adapter-unsupported"
    assert [(span.line, label) for span, label in diagnostic.secondary] == [(2, "named here")]


def test_what_is_saved_needs_the_folder_no_more(folder: Path) -> None:
    model = compiled("")
    model.save_pretrained(folder / "saved" / "here")
    (folder / "sql").rename(folder / "elsewhere")
    again = lora_fx.load(folder / "saved" / "here", llama(4), backend=None)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
