"""Adapters that come with weights: what they adapt is in their folder, or in the spec."""

import json
from pathlib import Path

import pytest

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.tiny import llama

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 9,
    "target_modules": ["q_proj", "up_proj"],
    "layers_to_transform": [1],
    "rank_pattern": {"q_proj": 6},
}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters" / "sql"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "main.lora"


def sites(spec: Path, text: str) -> list[tuple[str, str, int, float, bool]]:
    spec.write_text(f"lora 1\n{text}")
    found = lora_fx.plan(spec, llama(3)).sites
    return [(s.name.rpartition(".")[2], s.adapter, s.rank, s.alpha, s.trainable) for s in found]


def test_without_targets_the_folder_says_what_is_adapted(spec: Path) -> None:
    found = sites(spec, 'adapter sql { weights = "adapters/sql" }')
    assert found == [("q_proj", "sql", 6, 9.0, False), ("up_proj", "sql", 4, 9.0, False)]


def test_what_the_spec_sets_stays(spec: Path) -> None:
    text = 'adapter x { weights = "adapters/sql"  alpha = 2  trainable = true }'
    assert sites(spec, text) == [("q_proj", "x", 6, 2.0, True), ("up_proj", "x", 4, 2.0, True)]


def test_with_targets_the_spec_says_it_all(spec: Path) -> None:
    text = 'adapter x { weights = "nowhere"  rank = 3  target v_proj in layers[0] }'
    assert sites(spec, text) == [("v_proj", "x", 3, 8.0, False)]


def test_every_fault_is_found_at_its_line(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken = spec.parent / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps(CONFIG | {"use_qalora": True}))
    with pytest.raises(LoraFxError) as raised:
        sites(spec, 'adapter a { weights = "no/where" }\nadapter b { weights = "broken" }')
    found = [(d.code, Path(d.span.source.name).name) for d in raised.value.diagnostics if d.span]
    assert found == [("no-adapter", "main.lora"), ("peft-unsupported", "adapter_config.json")]


def test_what_the_folder_sets_is_of_the_folder(spec: Path) -> None:
    spec.write_text('lora 1 adapter sql { weights = "adapters/sql"  alpha = 2 }')
    site = lora_fx.plan(spec, llama(3)).sites[0]
    config = spec.parent / "adapters" / "sql" / "adapter_config.json"
    assert site.provenance["rank"].source.name == f"{config} as .lora"
    assert site.provenance["rank"].text == "rank = 6"
    assert site.provenance["alpha"].source.name == str(spec)
