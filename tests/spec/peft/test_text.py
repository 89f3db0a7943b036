"""The text that a config becomes when the model is not known: `texts/NAME.lora`."""

from pathlib import Path
from typing import Any

import pytest

import lora_fx
from lora_fx.spec.peft.read import read_config
from lora_fx.spec.peft.text import to_text
from tests.golden import assert_golden

HERE = Path(__file__).parent
TWO = {"target_modules": ["q_proj", "v_proj"]}

CASES: dict[str, dict[str, Any]] = {
    "simple": {**TWO, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "dotted": {"target_modules": ["self_attn.q_proj", "v_proj"]},
    "regex": {"target_modules": r".*\.[qv]_proj", "exclude_modules": r'.*\.0\..*|"\\'},
    "all-linear": {
        "target_modules": "All-Linear",
        "exclude_modules": ["lm_head", "mlp.up_proj"],
        "rank_pattern": {"q_proj": 2},
    },
    "words-of-the-language": {
        "target_modules": ["linear", "class", "regex", "parameter", "0", "q-proj", "a*b", "in", "q"]
    },
    "layers": {**TWO, "layers_to_transform": [5, 0, 1, 2, 1]},
    "first-pattern-wins": {
        **TWO,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 4},
        "alpha_pattern": {"q_proj": 7.5},
    },
    "patterns-in-different-orders": {
        **TWO,
        "rank_pattern": {"0.q_proj": 2, "q_proj": 4},
        "alpha_pattern": {"q_proj": 3, "0.q_proj": 5},
    },
    "patterns-add-no-sites": {
        "target_modules": ["self_attn.q_proj", "v_proj"],
        "exclude_modules": r".*\.7\..*",
        "layers_to_transform": [0, 1],
        "rank_pattern": {"q_proj": 2, r"layers\.\d+\.v_proj": 4, "k_proj": 16},
    },
    "patterns-of-one-value": {
        **TWO,
        "rank_pattern": {f"layers.{i}.self_attn.q_proj": 4 for i in range(3)}
        | {"layers.7.v_proj": 4},
    },
    "parameters": {
        **TWO,
        "target_parameters": ["experts.gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 4, r".*\.3\..*down_proj": 2},
    },
    "trained": {
        **TWO,
        "modules_to_save": ["head", "score"],
        "task_type": "SEQ_CLS",
        "trainable_token_indices": {"embed_tokens": [1, 1], "model.positions": [0], "lm_head": []},
    },
    "model-and-layers": {
        **TWO,
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "revision": "main",
        "layer_replication": [[0, 12], [4, 16]],
    },
}


def text(**settings: Any) -> str:
    """The text, which the language reads."""
    written = to_text(read_config(settings))
    lora_fx.parse(written)
    return written


@pytest.mark.parametrize("name", CASES)
def test_text(name: str) -> None:
    assert_golden(HERE / "texts" / f"{name}.lora", text(**CASES[name]))


def test_what_says_nothing() -> None:
    plain = text(**TWO)
    for nothing in (
        {"layers_to_transform": []},
        {"trainable_token_indices": []},
        {"base_model_name_or_path": "", "revision": "main"},
        {"eva_config": {"rho": 1.5}, "loftq_config": {}},
        {"fan_in_fan_out": True, "inference_mode": True, "peft_version": "9"},
        {"task_type": "CAUSAL_LM", "use_bdlora": None},
    ):
        assert text(**TWO, **nothing) == plain


@pytest.mark.parametrize(
    ("settings", "statement"),
    [
        ({"layers_to_transform": 3}, "target? q_proj, v_proj in layers[3]"),
        ({"trainable_token_indices": [3, 1]}, "tokens [3, 1]"),
        ({"task_type": "QUESTION_ANS"}, 'train? "**.*qa_outputs"'),
        ({"task_type": "TOKEN_CLS"}, 'train? "**.*classifier", "**.*score"'),
    ],
)
def test_statements(settings: dict[str, Any], statement: str) -> None:
    assert f"\n  {statement}\n" in text(**TWO, **settings)


def attributes(**settings: Any) -> str:
    lines = text(target_modules=["q_proj"], **settings).splitlines()
    written = [" ".join(line.split()) for line in lines if " = " in line]
    assert written[:2] == ["rank = 8", "alpha = 8"]
    return "; ".join(written[2:])


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"use_rslora": True}, "scaling = rslora"),
        ({"use_dora": True}, "variant = dora"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"lora_bias": True}, "lora_bias = true"),
        ({"ensure_weight_tying": True}, "tie = true"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, "offload = true"),
        ({"init_lora_weights": False}, "init = random"),
        ({"init_lora_weights": "Gaussian"}, "init = gaussian"),
        ({"init_lora_weights": "pissa"}, "init = pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "init = pissa(iterations = 16)"),
        ({"init_lora_weights": "olora"}, "init = olora"),
        ({"init_lora_weights": "orthogonal"}, "init = orthogonal"),
        ({"init_lora_weights": "mica"}, "init = mica"),
        ({"init_lora_weights": "eva"}, "init = eva"),
        (
            {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "tau": 0.99, "whiten": True}},
            "init = eva(rho = 1.5, whiten = true)",
        ),
        (
            {
                "init_lora_weights": "corda",
                "corda_config": {"corda_method": "kpm", "verbose": True},
            },
            "init = corda(method = kpm)",
        ),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 3}},
            "init = loftq(bits = 8, iterations = 3)",
        ),
        (
            {
                "init_lora_weights": "lora_ga",
                "lora_ga_config": {"direction": "ArBr", "scale": "unit"},
            },
            "init = lora_ga(direction = ArBr, scale = unit)",
        ),
        ({"alora_invocation_tokens": [5, 6]}, "variant = alora(tokens = [5, 6])"),
        (
            {"velora_config": {"num_groups": 8, "init_type": "random"}},
            "variant = velora(num_groups = 8, init_type = random)",
        ),
        ({"kasa_config": {}}, "variant = kasa"),
        ({"monteclora_config": {"num_samples": 4}}, "variant = monteclora(num_samples = 4)"),
        (
            {
                "use_bdlora": {
                    "target_modules_bd_a": ["o_proj"],
                    "nblocks": 2,
                    "match_strict": False,
                }
            },
            'variant = bdlora(a = ["o_proj"], blocks = 2, strict = false)',
        ),
    ],
)
def test_attributes(settings: dict[str, Any], written: str) -> None:
    assert attributes(**settings) == written
