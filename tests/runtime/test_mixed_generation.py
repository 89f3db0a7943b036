"""`generate(adapter_names=…)` writes for each sample what it would be alone with its adapter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.runtime.mixed import mixed
from tests.tiny import VOCABULARY, tokens

NAMES = ["b", "__base__", "a", "d"]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several-beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}


def write(model: Any, ids: Tensor, **how: Any) -> Tensor:
    settings = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    masks = {"attention_mask": torch.ones_like(ids)}
    return model.generate(input_ids=ids, **masks, **settings | how)


def alone(model: Any, ids: Tensor, names: list[str], **how: Any) -> Tensor:
    written = []
    for row, name in zip(ids, names, strict=True):
        model.set_adapter([] if name == "__base__" else name)
        written.append(write(model, row[None], **how))
    return torch.cat(written)


@pytest.mark.parametrize(
    ("backend", "way"),
    [
        *((None, way) for way in WAYS),
        ("eager", "static"),
        pytest.param("inductor", "several-beams", marks=pytest.mark.slow),
    ],
)
def test_each_sample_is_written_as_alone(backend: str | None, way: str) -> None:
    model, ids = mixed(backend=backend), tokens(4, 9)
    got = write(model, ids, adapter_names=NAMES, **WAYS[way])
    assert torch.equal(got, alone(model, ids, NAMES, **WAYS[way]))
    wrong = alone(model, ids, [*NAMES[1:], NAMES[0]], **WAYS[way])
    assert not torch.equal(got, wrong)


def test_sequences_of_a_sample_have_its_adapter() -> None:
    """Sampled from the one token that is likeliest, so that three of a sample are alike."""
    model, ids = mixed(backend=None), tokens(4, 9)
    how = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    got = write(model, ids, adapter_names=NAMES, **how)
    want = alone(model, ids, NAMES)
    assert torch.equal(got, want.repeat_interleave(3, 0))


def test_samples_are_drawn_from_their_own_distribution() -> None:
    model, ids = mixed(backend=None), tokens(4, 9)
    how = {"do_sample": True, "top_k": 0, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    got = write(model, ids, adapter_names=NAMES, max_new_tokens=1, **how).scores[0]
    for i, name in enumerate(NAMES):
        model.set_adapter([] if name == "__base__" else name)
        want = write(model, ids[i : i + 1], max_new_tokens=1, **how).scores[0][0]
        torch.testing.assert_close(got[i], want, rtol=1e-5, atol=1e-5)
        assert (got[i] - got[i - 1]).abs().max() > 1e-2


ENCODER_DECODERS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=44,
            decoder_ffn_dim=44, max_position_embeddings=64, forced_eos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_the_encoder_is_routed_too(backend: str | None, kind: str, beams: int) -> None:
    torch.manual_seed(0)
    spec = """lora 1
adapter a { rank = 4 scaling = 2 init = random target linear }
adapter b { rank = 3 scaling = 2 init = random target linear }"""
    model = lora_fx.compile(ENCODER_DECODERS[kind](), spec, backend=backend).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    ids, names = tokens(3, 9), ["b", "__base__", "a"]
    got = write(model, ids, adapter_names=names, num_beams=beams)
    assert torch.equal(got, alone(model, ids, names, num_beams=beams))
    assert not torch.equal(got, alone(model, ids, ["a", "b", "a"], num_beams=beams))


def test_what_cannot_be_leaves_nothing_behind() -> None:
    model, ids = mixed(backend=None), tokens(4, 9)
    before = write(model, ids)
    for names, said in ((["a"], "for 1 samples"), (["a", "x", "b", "y"], "`x`(.|\n)*`y`")):
        with pytest.raises(LoraFxError, match=said):
            write(model, ids, adapter_names=names)
    assert torch.equal(write(model, ids), before)
    with model.disable_adapter():
        base = write(model, ids)
        assert torch.equal(write(model, ids, adapter_names=NAMES), base)
    assert not torch.equal(write(model, ids, adapter_names=NAMES), base)
