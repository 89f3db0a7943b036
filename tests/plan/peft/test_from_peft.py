"""What depends on the model: texts, models that are only named, and where PEFT differs."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.error import NoMatchingPeftModuleError

import lora_fx
from lora_fx.plan.peft import peft_text
from tests.architectures import ARCHITECTURES, on_meta
from tests.golden import assert_golden
from tests.plan.peft.configs import configs
from tests.plan.peft.made import by_import, by_peft, by_plan

HERE = Path(__file__).parent
Q_V = {"target_modules": ["q_proj", "v_proj"], "r": 2}

TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "simple": ("llama", Q_V),
    "default-targets": ("gpt2", {}),
    "unmatched": ("llama", {"target_modules": ["q_proj", "nothing"], "exclude_modules": ["none"]}),
    "several-stacks": ("t5", {"target_modules": ["q", "v"], "layers_to_transform": [0, 1, 9]}),
    "patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "q_proj": 3, r".*\.mlp\..*": 5},
            "alpha_pattern": {"nothing": 3},
        },
    ),
    "every-name": (
        "llama",
        {
            "target_modules": [
                f"model.layers.{i}.self_attn.{p}" for i in (0, 2) for p in ("q_proj", "v_proj")
            ],
            "rank_pattern": {f"model.layers.{i}.self_attn.q_proj": 4 + i for i in (0, 2)},
        },
    ),
    "stacked-experts": ("qwen3_moe", {"target_modules": "all-linear", "r": 2}),
    "heads": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "no-dot": ("distilbert", {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
    "tied": ("mistral", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    architecture, config = TEXTS[name]
    assert_golden(HERE / "texts" / f"{name}.lora", peft_text(config, on_meta(architecture)))


def others(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Configs of which PEFT makes something else."""
    return [
        config | {"r": config["r"] + 1, "rank_pattern": {}},
        config | {"lora_alpha": 3, "alpha_pattern": {}},
        config | {"use_rslora": not config.get("use_rslora")},
        config | {"exclude_modules": r".*\.layers\.1\..*"},
        config | {"modules_to_save": ["norm"]},
        config | {"trainable_token_indices": [4]},
        config | {"bias": "all" if config.get("bias", "none") == "none" else "none"},
    ]


@pytest.mark.parametrize("name", ["suffixes", "regex", "all-linear", "rslora", "bias", "tokens"])
def test_the_comparison_sees_what_differs(name: str) -> None:
    config = dict(configs(on_meta("qwen2")))[name]
    made = by_peft(ARCHITECTURES["qwen2"](), config)
    assert by_import(config, on_meta("qwen2")) == made
    for other in others(dict(config)):
        assert by_import(other, on_meta("qwen2")) != made, other


def test_a_model_that_only_the_config_names(tmp_path: Path) -> None:
    model = on_meta("gpt2")
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "model")
    settings = {"base_model_name_or_path": str(tmp_path / "model"), "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    spec = lora_fx.from_peft(tmp_path)
    assert spec.model is not None
    assert by_plan(lora_fx.plan(spec)) == by_peft(ARCHITECTURES["gpt2"](), {"r": 2})
    given = lora_fx.from_peft(LoraConfig(r=2), tmp_path / "model")
    assert by_plan(lora_fx.plan(given, model)) == by_plan(lora_fx.plan(spec))


def test_without_a_model_names_are_taken_as_they_are_meant() -> None:
    """Only not layers beyond the last or of several stacks, tied modules, experts' old names."""
    for architecture in ("llama", "gpt2", "bloom", "bert", "vit", "gpt_oss"):
        for name, config in configs(on_meta(architecture)):
            if name.startswith(("default", "tied")) or name == "layers":
                continue
            spec = lora_fx.from_peft(dict(config))
            made = by_peft(ARCHITECTURES[architecture](), config)
            assert by_plan(lora_fx.plan(spec, on_meta(architecture))) == made, name


@pytest.mark.parametrize(
    ("architecture", "config", "code"),
    [
        ("llama", {"target_modules": ["nothing"]}, "peft-no-targets"),
        ("llama", {"target_modules": "q_proj"}, "peft-no-targets"),
        ("llama", {"target_modules": []}, "peft-no-targets"),
        ("phi3", {}, "peft-no-targets"),
        (
            "llama",
            {**Q_V, "layers_to_transform": [0], "layers_pattern": "self_attn"},
            "peft-no-targets",
        ),
        ("mixtral", {"target_modules": ["w1", "q_proj"]}, "peft-unsupported"),
        (
            "llama",
            {**Q_V, "target_modules": ["lm_head"], "modules_to_save": ["head"]},
            "peft-unsupported",
        ),
    ],
)
def test_what_peft_refuses_too(architecture: str, config: dict[str, Any], code: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        by_peft(ARCHITECTURES[architecture](), config)
    with pytest.raises(lora_fx.LoraFxError) as raised:
        lora_fx.from_peft(config, on_meta(architecture))
    assert [diagnostic.code for diagnostic in raised.value.diagnostics] == [code]


def test_where_this_differs_from_peft() -> None:
    # PEFT forgets its default targets where it looks for experts; they are in its table.
    with pytest.raises(NoMatchingPeftModuleError):
        by_peft(ARCHITECTURES["mixtral"](), {})
    assert len(by_import({}, on_meta("mixtral")).sites) == 6
    # PEFT puts adapters into the copy of a module too.
    inside = {**Q_V, "modules_to_save": ["attn"]}
    assert len(by_peft(ARCHITECTURES["llama"](), inside).sites) == 12
    with pytest.raises(lora_fx.LoraFxError, match="trained as a whole"):
        lora_fx.from_peft(inside, on_meta("llama"))
