"""Adapters inside `nn.TransformerEncoderLayer` act in evaluation as they do in training."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.dense import relative

SPEC = "lora 1 adapter a { rank = 2  init = random  target linear1, linear2 }"


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 10, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2)).eval().requires_grad_(False)


def x() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_in_evaluation_as_in_training(backend: str | None) -> None:
    model = lora_fx.compile(encoder(), SPEC, backend=backend)
    want = model.train()(x())
    assert relative(model.eval()(x()), want) < 1e-6
    with torch.no_grad():
        assert relative(model(x()), want) < 1e-6
        assert relative(encoder()(x()), want) > 1e-2
        with model.disable_adapter():
            assert torch.equal(model(x()), encoder()(x()))
        assert relative(model(x()), want) < 1e-6


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_with_padding() -> None:
    """Which torch turns into nested tensors."""
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    model = lora_fx.compile(encoder(), SPEC, backend=None).train()
    want = model[0](x(), src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        got = model.eval()[0](x(), src_key_padding_mask=padding)[~padding]
        base = encoder()[0](x(), src_key_padding_mask=padding)[~padding]
    assert relative(got, want) < 1e-6
    assert relative(base, want) > 1e-2


def test_merged_and_unloaded_it_is_torch_s_own_again() -> None:
    model = lora_fx.compile(encoder(), SPEC, backend=None)
    want = model(x())
    model.merge_adapter()
    assert relative(model(x()), want) < 1e-6
    plain = model.merge_and_unload()
    layer = plain[0].layers[0]
    assert type(layer) is nn.TransformerEncoderLayer
    assert layer.activation_relu_or_gelu == 1
    assert relative(plain(x()), want) < 1e-5


@torch.no_grad()
def test_a_copy_looks_at_its_own_adapters() -> None:
    model = lora_fx.compile(encoder(), SPEC, backend=None)
    want = model(x())
    twin = copy.deepcopy(model)
    with model.disable_adapter():
        assert relative(twin(x()), want) < 1e-6
        assert torch.equal(model(x()), encoder()(x()))


@torch.no_grad()
def test_a_mixed_batch() -> None:
    """By names alone, which make adapters act for one call."""
    text = f"{SPEC} route {{ default -> __base__ }}"
    model = lora_fx.compile(encoder(), text, backend=None)
    got = model(x(), adapter_names=["a", "__base__", "a"])
    model.set_adapter("a")
    alone = model(x())
    assert relative(got[[0, 2]], alone[[0, 2]]) < 1e-6
    assert relative(got[1], encoder()(x())[1]) < 1e-6
    assert relative(got[1], alone[1]) > 1e-2


@pytest.mark.parametrize("backend", [None, "eager"])
def test_in_a_mixed_batch_where_none_is_active(backend: str | None) -> None:
    model: Any = lora_fx.compile(encoder(), SPEC, backend=backend)
    with torch.no_grad():
        want = model(x())
        model.set_adapter([])
        assert torch.equal(model(x()), encoder()(x()))
        got = model(x(), adapter_names=["a", "__base__", "a"])
        assert relative(got[::2], want[::2]) < 1e-6
        assert relative(got[1], encoder()(x())[1]) < 1e-6
        assert relative(want[1], encoder()(x())[1]) > 1e-2
        assert torch.equal(model(x()), encoder()(x()))
