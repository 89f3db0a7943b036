"""A plan, or a spec alone, as PEFT's config: PEFT makes of it what the plan says."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.architectures import ARCHITECTURES
from tests.plan.peft.made import Made, by_peft, by_plan
from tests.tiny import llama

ON_ANY_MODEL = {
    "linear": "target linear",
    "names": "rank = 3  alpha = 5  scaling = rslora  target q_proj, v_proj",
    "ranks": "target q_proj, up_proj  target q_proj { rank = 6 }  target up_proj { alpha = 3 }",
    "following": "rank = 4  alpha = 2 * rank  target q_proj, k_proj  target k_proj { rank = 6 }",
    "later rule": """target "**.self_attn.*_proj" { rank = 3 }
        target "**.{q,o}_proj" { rank = 4  alpha = 7 }  target o_proj { rank = 5 }""",
    "layers": "target q_proj  target q_proj, v_proj in layers[..1, 2..3] { rank = 2 }",
    "except": 'target regex ".*proj" except down_proj, "model.layers.0.**" { rank = 2 }',
    "trained": 'target q_proj  train "**.*norm"  tokens [1, 2]',
    "bias": "bias = lora_only  lora_bias = true  target q_proj",
    "dora": "variant = dora  dropout = 0.5  target q_proj",
    "dictionary of tokens": "tokens [3] in embed_tokens  target v_proj",
}
ON_THIS_MODEL = {
    **ON_ANY_MODEL,
    "class": 'target class "Linear" except lm_head { rank = 3 }',
    "condition": "target linear where module.out_features > 32 { rank = 2 }",
    "by layer": "rank = layer.index + 1  alpha = 3 * rank  target q_proj, up_proj",
    "open range": "target q_proj in layers[1..]",
    "parameters": 'target parameter "**.{q,up}_proj.weight"  target v_proj { rank = 2 }',
    "one norm": 'target q_proj  train "model.norm"',
    "embedding": "target embed_tokens { rank = 3 }  target lm_head",
}


def text(body: str, more: str = "") -> str:
    return f"lora 1\nadapter default {{ {body} }}\n{more}"


def made(config: dict[str, Any], layers: int = 3) -> Made:
    settings = {key: value for key, value in config.items() if key != "peft_type"}
    return by_peft(llama(layers, attention_bias=True), settings)


@pytest.mark.parametrize("body", ON_ANY_MODEL.values(), ids=ON_ANY_MODEL.keys())
def test_a_spec_alone(body: str) -> None:
    plan = lora_fx.plan(text(body), llama(3, attention_bias=True))
    assert made(lora_fx.parse(text(body)).to_peft()["default"]) == by_plan(plan)


@pytest.mark.parametrize("body", ON_THIS_MODEL.values(), ids=ON_THIS_MODEL.keys())
def test_a_plan(body: str) -> None:
    plan = lora_fx.plan(text(body), llama(3, attention_bias=True))
    assert made(plan.to_peft()["default"]) == by_plan(plan)


@pytest.mark.parametrize("layers", ["replicate 0..2, 1..3", "replicate 0..3, 0..2 drop 1"])
def test_replicated_layers(layers: str) -> None:
    spec = text("target q_proj in layers[2..] { rank = 3 }", f"layers {{ {layers} }}")
    plan = lora_fx.plan(spec, llama(3, attention_bias=True))
    assert made(plan.to_peft()["default"]) == by_plan(plan)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "vit", "opt", "bert"])
def test_other_architectures(name: str) -> None:
    with torch.device("meta"):
        model, other = ARCHITECTURES[name](), ARCHITECTURES[name]()
    body = 'rank = 2  target linear  target? "**.{q,query,c_attn}" { rank = 3 }'
    plan = lora_fx.plan(text(body), model)
    (config,) = plan.to_peft().values()
    assert by_peft(other, {k: v for k, v in config.items() if k != "peft_type"}) == by_plan(plan)


def faults(spec: str, planned: bool) -> list[str]:
    parsed = lora_fx.parse(spec)
    with pytest.raises(LoraFxError) as raised:
        (lora_fx.plan(parsed, llama(3)) if planned else parsed).to_peft()
    assert {d.code for d in raised.value.diagnostics} == {"peft-cannot-say"}
    return [d.message for d in raised.value.diagnostics]


EVERYTHING = text(
    """dtype = bfloat16
    target q_proj { init = olora }
    target v_proj { dropout = 0.1  variant = dora }
    offload = true""",
    """route { }
    optimizer { lr = 1 }
    quantize linear { method = int8 }
    merge x { from default }
    layers { replicate 0..3  share = nothing }""",
)


@pytest.mark.parametrize("planned", [True, False])
def test_everything_that_cannot_be_said_is_said(planned: bool) -> None:
    found = "\n".join(faults(EVERYTHING, planned))
    for word in ("route", "optimizer", "quantize", "merge", "shares"):
        assert word in found
    for word in ("`init`", "`dropout`", "`variant`", "`dtype`", "`offload`"):
        assert word in found


@pytest.mark.parametrize(
    "body",
    [
        "target q_proj in layers[1..]",
        "target linear except lm_head  target q_proj",
        'target class "Linear"',
        "target q_proj where layer.index > 1",
        "rank = layer.index + 1  target q_proj",
        "alpha = 2 * rank  target q_proj { alpha = 3 }  target v_proj { rank = 4 }",
        "target q_proj { scaling = rslora }",
        "target q_proj  train norm",
    ],
)
def test_what_needs_the_model(body: str) -> None:
    parsed = lora_fx.parse(text(body))
    with pytest.raises(LoraFxError) as raised:
        parsed.to_peft()
    assert {d.code for d in raised.value.diagnostics} == {"peft-cannot-say"}
    model = llama(3, attention_bias=True)
    if "train norm" not in body:
        assert made(lora_fx.plan(parsed, model).to_peft()["default"]) == by_plan(
            lora_fx.plan(parsed, model)
        )


@pytest.mark.parametrize(
    "body",
    [
        "scaling = 0.5  rank = 6  target q_proj, v_proj  target v_proj { scaling = 0.7 }",
        "target q_proj { scaling = rslora }  target k_proj",
    ],
)
def test_scalings_that_differ_become_alphas(body: str) -> None:
    plan = lora_fx.plan(text(body), llama(3, attention_bias=True))
    found = {n: scaling for n, (_, _, scaling) in made(plan.to_peft()["default"]).sites.items()}
    assert found == pytest.approx({site.name: site.scaling for site in plan.sites})
    assert len(set(found.values())) == 2


def test_a_wrong_config_would_be_seen() -> None:
    plan = lora_fx.plan(text(ON_ANY_MODEL["ranks"]), llama(3, attention_bias=True))
    config = plan.to_peft()["default"]
    for change in ({"r": 7}, {"rank_pattern": {}}, {"lora_alpha": 3}, {"bias": "all"}):
        assert made(config | change) != by_plan(plan)


@pytest.mark.parametrize(
    ("name", "body", "what"),
    [
        ("qwen3_moe", "target q_proj  target linear", "stacked experts"),
        ("deepseek_v3", "target up_proj", "stacked experts"),
        ("llama", "target embed_tokens, q_proj  tokens [3, 5] in embed_tokens", "rows"),
    ],
)
def test_what_peft_would_read_otherwise(name: str, body: str, what: str) -> None:
    with pytest.raises(LoraFxError) as raised:
        lora_fx.plan(text(body), ARCHITECTURES[name]()).to_peft()
    (fault,) = raised.value.diagnostics
    assert fault.code == "peft-cannot-say"
    assert what in fault.message


def test_peft_trains_no_rows_of_an_embedding_that_it_adapts() -> None:
    config = LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3, 5])
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
        get_peft_model(llama(3), config)


def test_other_names_of_such_models_are_said() -> None:
    plan = lora_fx.plan(text("target q_proj, o_proj"), ARCHITECTURES["qwen3_moe"]())
    assert plan.to_peft()["default"]["target_modules"] == ["o_proj", "q_proj"]
    plan = lora_fx.plan(text("target up_proj, gate_proj"), llama(3))
    assert plan.to_peft()["default"]["target_modules"] == ["gate_proj", "up_proj"]


@pytest.mark.parametrize("planned", [True, False])
def test_a_bias_on_b_with_another_init(planned: bool) -> None:
    text = "lora 1 adapter a { lora_bias = true  init = INIT  target q_proj }"
    (fault,) = faults(text.replace("INIT", "pissa"), planned)
    assert "with its default init only" in fault
    parsed = lora_fx.parse(text.replace("INIT", "random"))
    assert (lora_fx.plan(parsed, llama(3)) if planned else parsed).to_peft()["a"]["lora_bias"]
