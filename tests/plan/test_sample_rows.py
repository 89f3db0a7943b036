"""Which modules get the samples of a batch, one behind the other."""

import pytest
from torch import nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    SwinConfig,
    SwinForImageClassification,
)

import lora_fx
from lora_fx.diagnostics import LoraFxError
from lora_fx.plan.sample_rows import require_sample_rows, rows_of
from tests.tiny import VOCABULARY, llama

LINEAR = "lora 1\nadapter a { rank = 2 target linear }"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 44, "hidden_size": 32}


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=32, **SIZES))


def fsmt() -> nn.Module:
    """Its layers get tokens first."""
    widths = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32}
    widths |= {"encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "encoder_layers": 1}
    vocabularies = {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}
    config = FSMTConfig(langs=["en", "de"], decoder_layers=1, **widths, **vocabularies)
    return FSMTForConditionalGeneration(config)


def swin() -> nn.Module:
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return SwinForImageClassification(config)


@pytest.mark.parametrize(
    ("build", "others"),
    [(llama, set()), (opt, {"fc1", "fc2"}), (swin, {"q_proj", "k_proj", "v_proj", "o_proj"})],
)
def test_rows_are_samples_or_not(build: type, others: set[str]) -> None:
    plan = lora_fx.plan(LINEAR, build())
    found = rows_of(plan, [site.fqn for site in plan.sites])
    assert len(found) == len(plan.sites)
    assert {fqn.rpartition(".")[2] for fqn, rows in found.items() if rows != 7} == others


@pytest.mark.parametrize("build", [opt, swin, fsmt])
def test_other_rows_are_refused_when_compiled(build: type) -> None:
    with pytest.raises(LoraFxError, match="rows that are not the samples"):
        lora_fx.compile(build(), f"{LINEAR} route {{ train = true }}", backend=None)
    lora_fx.compile(build(), LINEAR, backend=None)


def test_of_a_module_that_is_no_model_nothing_is_known() -> None:
    plan = lora_fx.plan(
        "lora 1 adapter a { rank = 1 target linear }", nn.Sequential(nn.Linear(5, 3))
    )
    assert rows_of(plan, ["0"]) == {}
    require_sample_rows(plan, ["0"])
