"""Each kind of layer: PEFT with equal tensors, and dense float64, compute the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import BdLoraConfig, VeloraConfig
from safetensors.torch import load_file
from torch import Tensor

from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import (
    PREFIX,
    Kind,
    by_peft,
    dense,
    dense_forward,
    forward,
    of,
    ours,
    padded,
    scatter,
    state_of,
    step,
    step_of_peft,
)
from tests.architectures import LAYERS
from tests.dense import relative
from tests.example_inputs import example_inputs

TOKENS = "target q_proj tokens [0, 3, 7, 50]"
EXPERTS = 'target parameter "**.experts.{gate_up_proj,down_proj}"'
STACKS = ("gate_up_proj", "down_proj")
KINDS = {
    "experts": Kind(
        of("mixtral"),
        EXPERTS,
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        parameters=STACKS,
    ),
    "turned experts": Kind(
        of("gpt_oss"),
        f"bias = all  {EXPERTS}",
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "bias": "all"},
        parameters=STACKS,
    ),
    "a parameter": Kind(
        of("mixtral"),
        'bias = none  target parameter "**.mlp.gate.weight"',
        {"target_parameters": ["mlp.gate.weight"]},
        parameters=("weight",),
    ),
    "conv1d": Kind(of("gpt2"), "target linear", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "lora_bias": Kind(
        of("gpt2"),
        "lora_bias = true target c_attn, c_fc",
        {"target_modules": ["c_attn", "c_fc"], "lora_bias": True},
    ),
    "embedding": Kind(
        of("llama"),
        "target embed_tokens, v_proj",
        {"target_modules": ["embed_tokens", "v_proj"]},
    ),
    "scaled embedding": Kind(
        of("bart", scale_embedding=True, tie_word_embeddings=False),
        'target "model.encoder.embed_tokens"',
        {"target_modules": ["model.encoder.embed_tokens"]},
    ),
    "scaled tied embedding": Kind(
        of("gemma3_text"), "target embed_tokens", {"target_modules": ["embed_tokens"]}
    ),
    "bias = all": Kind(
        of("gpt2"), "bias = all target c_attn", {"target_modules": ["c_attn"], "bias": "all"}
    ),
    "bias = lora_only": Kind(
        of("gpt_neox"),
        "bias = lora_only target query_key_value",
        {"target_modules": ["query_key_value"], "bias": "lora_only"},
    ),
    "dora": Kind(
        of("qwen2"),
        "variant = dora  target q_proj, down_proj",
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ),
    "dora on conv1d": Kind(
        of("gpt2"),
        "variant = dora  bias = lora_only  target c_attn, c_fc",
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "bias": "lora_only"},
    ),
    "dora on an embedding": Kind(
        of("llama"),
        "variant = dora  target embed_tokens, v_proj",
        {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    ),
    "dora on a scaled embedding": Kind(
        of("bart", scale_embedding=True, tie_word_embeddings=False),
        'variant = dora  target "model.encoder.embed_tokens"',
        {"target_modules": ["model.encoder.embed_tokens"], "use_dora": True},
    ),
    "convolution": Kind(
        of("vit"),
        'lora_bias = true  target class "Conv2d"  target q_proj',
        {"target_modules": ["projection", "q_proj"], "lora_bias": True},
    ),
    "convolution trained": Kind(
        of("vit"),
        'bias = lora_only  target q_proj  train "vit.embeddings.patch_embeddings.projection"',
        {"target_modules": ["q_proj"], "modules_to_save": ["projection"], "bias": "lora_only"},
    ),
    "dora on convolutions": Kind(
        of("resnet"),
        'variant = dora  target class "Conv2d"',
        {"target_modules": ["convolution"], "use_dora": True},
    ),
    "bdlora": Kind(
        of("llama"),
        """variant = bdlora(a = ["down_proj"], b = ["gate_proj", "up"], blocks = 2)
        target gate_proj, up_proj, down_proj { rank = 4 }""",
        {
            "r": 4,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "use_bdlora": BdLoraConfig(["down_proj"], ["gate_proj", "up"], nblocks=2),
        },
        scaling=5 / 4,
    ),
    "velora": Kind(
        of("llama"),
        "variant = velora(num_groups = 6)  target q_proj, down_proj",
        {
            "target_modules": ["q_proj", "down_proj"],
            "velora_config": VeloraConfig(num_groups=6),
        },
    ),
    "train": Kind(
        of("llama"),
        'target q_proj train "model.norm", lm_head, embed_tokens',
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["model.norm", "lm_head", "embed_tokens"],
        },
    ),
    "train a layer's part": Kind(
        of("bert"),
        'target query train "bert.pooler", classifier, "bert.encoder.layer.1.output"',
        {
            "target_modules": ["query"],
            "modules_to_save": ["pooler", "classifier", "encoder.layer.1.output"],
        },
    ),
    "tokens": Kind(
        of("llama"),
        TOKENS,
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 3, 7, 50]},
    ),
    "tokens tied and scaled": Kind(
        of("gemma3_text"),
        TOKENS,
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 3, 7, 50]},
    ),
    "tied": Kind(
        of("mistral"),
        "target embed_tokens { tie = true } target q_proj",
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "ensure_weight_tying": True},
        tied=True,
    ),
    "tied and trained": Kind(
        of("mistral"),
        "tie = true target q_proj train embed_tokens",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        tied=True,
    ),
}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert tensor.norm() > 0, key
        assert relative(got[key], tensor) < 1e-5, key


@pytest.mark.parametrize("name", KINDS)
def test_as_peft_and_as_dense_weights(name: str) -> None:
    kind = KINDS[name]
    model = ours(kind)
    got, state = step(model), state_of(model)
    theirs = by_peft(kind, state)
    assert_same(got, step_of_peft(theirs))
    assert_same(got, dense(kind, state))
    assert_same(step(model, padded), step_of_peft(theirs, padded))
    plain = kind.base()
    inputs = example_inputs(plain)
    with model.disable_adapter(), torch.no_grad():
        off, base = model(**inputs).logits, plain(**inputs).logits
    assert torch.equal(off, base)
    assert relative(got["logits"], base) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["layers", "model"])
@pytest.mark.parametrize("name", KINDS)
def test_rewritten(name: str, unit: str) -> None:
    kind = KINDS[name]
    model, marked = ours(kind, "eager", unit), ours(kind)
    assert_same(step(model), step(marked))
    inputs = example_inputs(kind.base())
    with model.disable_adapter(), marked.disable_adapter(), torch.no_grad():
        assert relative(model(**inputs).logits, marked(**inputs).logits) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "conv1d",
        "scaled tied embedding",
        "tokens tied and scaled",
        "tied",
        "dora",
        "dora on an embedding",
        "dora on a scaled embedding",
    ],
)
def test_as_precise_as_peft_in_bfloat16(name: str) -> None:
    """With float32 adapters on a bfloat16 base: as near to float64 as PEFT is."""
    kind = replace(KINDS[name], base=lambda: KINDS[name].base().to(torch.bfloat16))
    model = ours(kind)
    got, state = step(model), state_of(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert got["logits"].dtype is torch.bfloat16
    theirs = step_of_peft(by_peft(kind, state))
    for key, exact in dense(kind, state).items():
        error = relative(theirs[key], exact)
        assert error < 0.2, key
        assert relative(got[key], exact) < 2 * error + 4e-2, key


def test_what_is_tied_has_one_state_of_the_optimizer() -> None:
    """PEFT steps the same memory twice; here it is as if the one weight were adapted once."""
    kind = KINDS["tied"]
    model = ours(kind)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 2 + 2 * LAYERS
    own = {key: t for key, t in state_of(model).items() if "lm_head" not in key}
    exact = {key: t.double().clone().requires_grad_() for key, t in own.items()}
    ours_steps = torch.optim.Adam(parameters, lr=0.01)
    exact_steps = torch.optim.Adam(exact.values(), lr=0.01)
    for _ in range(3):
        forward(model, example_inputs(model))
        ours_steps.step()
        exact_steps.zero_grad()
        dense_forward(kind, exact)
        exact_steps.step()
    for key, tensor in exact.items():
        assert relative(state_of(model)[key], tensor) < 1e-4, key
    theirs = by_peft(kind, state_of(model))
    assert len([p for p in theirs.parameters() if p.requires_grad]) == 4 + 2 * LAYERS


def test_what_is_tied_stays_tied_in_bfloat16() -> None:
    kind = replace(KINDS["tied"], base=lambda: KINDS["tied"].base().to(torch.bfloat16))
    model = ours(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    forward(model, example_inputs(model))
    before = state_of(model)[f"{PREFIX}lm_head.lora_A.weight"].clone()
    optimizer.step()
    state = state_of(model)
    for tied, own in (("A", "B"), ("B", "A")):
        embedding = state[f"{PREFIX}model.embed_tokens.lora_embedding_{own}"]
        assert torch.equal(state[f"{PREFIX}lm_head.lora_{tied}.weight"], embedding.T)
    assert not torch.equal(state[f"{PREFIX}lm_head.lora_A.weight"], before)


@pytest.mark.parametrize("name", [n for n in KINDS if "scaled" not in n])
def test_a_checkpoint_of_trainer_holds_all_of_it(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model, twin = ours(kind), ours(kind)
    scatter(twin)
    want = step(model)
    assert relative(step(twin)["logits"], want["logits"]) > 1e-3
    model.save_pretrained(tmp_path / "checkpoint-7")
    saved = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    own = {t.data_ptr() for t in live_tensors(model, "default").values()}
    assert len(saved) == len(own)
    result = twin.load_state_dict(saved, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(step(twin), want)
