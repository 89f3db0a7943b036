"""Merges into the base: refused where the weight is another module's too, or packed."""

import bitsandbytes
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.tiny import llama

REPLICATED = "layers { replicate 0..3, 1..4 %s }"
COPIES = "adapter a { rank = 2  target q_proj }"
TIED = "adapter a { rank = 2  target embed_tokens %s }"
INTO = 'merge all { from a  into = base%s  save = "out" }'


def refused(text: str, model: nn.Module) -> str:
    try:
        lora_fx.plan(f"lora 1\n{text}", model)
    except LoraFxError as error:
        (fault,) = error.diagnostics
        assert fault.code == "cannot-apply"
        return str(fault.help)
    return ""


@pytest.mark.parametrize(
    ("layers", "adapter", "written"),
    [
        (REPLICATED % "", COPIES, "share = nothing"),
        (REPLICATED % "share = nothing", COPIES, ""),
        (REPLICATED % "", "adapter a { rank = 2  target q_proj in layers[..1] }", ""),
        (REPLICATED % "", "adapter a { rank = 2  target q_proj in layers[1..2] }", "share"),
        ("", COPIES, ""),
    ],
)
def test_layers_that_share_their_weights(layers: str, adapter: str, written: str) -> None:
    help = refused(f"{layers}\n{adapter}\n{INTO % ''}", llama(4))
    assert written in help
    assert bool(written) == bool(help)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head(tied: bool) -> None:
    model = llama(1, tie_word_embeddings=tied)
    assert bool(refused(f"{TIED % ''}\n{INTO % ''}", model)) == tied
    assert not refused(f"{TIED % '{ tie = true }'}\n{INTO % ''}", model)


def test_a_module_with_two_names_is_one() -> None:
    model = llama(1)
    model.again = model.model.layers[0].self_attn.q_proj
    assert not refused(f"{COPIES}\n{INTO % ''}", model)
    other = nn.Linear(*reversed(model.again.weight.shape), bias=False)
    other.weight = model.again.weight
    model.other = other
    assert refused(f"{COPIES}\n{INTO % ''}", model)


def test_what_goes_into_an_adapter_is_not_refused() -> None:
    assert not refused(f"{REPLICATED % ''}\n{COPIES}\nmerge all {{ from a }}", llama(4))


def test_weights_in_4_bits() -> None:
    by_spec = f"quantize q_proj {{ method = nf4 }}\n{COPIES}\n{INTO}"
    assert "dequantize = true" in refused(by_spec % "", llama(1))
    assert not refused(by_spec % "(dequantize = true)", llama(1))


def test_a_base_that_came_in_4_bits() -> None:
    model = llama(1)
    attention = model.model.layers[0].self_attn
    weight = attention.q_proj.weight.data
    packed = bitsandbytes.nn.Linear4bit(*reversed(weight.shape), bias=False, quant_type="nf4")
    packed.load_state_dict({"weight": weight})
    attention.q_proj = packed.to("cpu")
    assert attention.q_proj.weight.dtype is torch.uint8
    assert "dequantize = true" in refused(f"{COPIES}\n{INTO % ''}", model)
    assert not refused(f"{COPIES}\n{INTO % '(dequantize = true)'}", model)
