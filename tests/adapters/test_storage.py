"""Tensors go in and come out in PEFT's shapes; nobody else sees how they are kept."""

import pytest
import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.factors import Arithmetic
from tests.marked import Block, add_adapter


def test_names_and_shapes() -> None:
    site = add_adapter(nn.Linear(5, 7), "one", 2)
    names = {name: tuple(p.shape) for name, p in site.named_parameters()}
    assert names == {
        "weight": (7, 5),
        "bias": (7,),
        "lora_A.one.weight": (2, 5),
        "lora_B.one.weight": (7, 2),
    }
    kept = storage.tensors(site, "one")
    assert kept["lora_A.weight"] is site.lora_A["one"].weight
    assert kept["lora_B.weight"] is site.lora_B["one"].weight


def test_marking_twice_is_marking_once() -> None:
    linear = nn.Linear(5, 7)
    assert storage.mark(storage.mark(linear)) is linear
    assert type(linear).__mro__.count(storage.Site) == 1


@pytest.mark.parametrize("trainable", [True, False])
def test_insert_keeps_flag_and_does_not_activate(trainable: bool) -> None:
    site = storage.mark(nn.Linear(5, 7))
    tensors = {"lora_A.weight": torch.ones(2, 5), "lora_B.weight": torch.ones(7, 2)}
    storage.insert(site, "one", tensors, Arithmetic(1, 1, False, 0.0, "activation"), trainable)
    assert {p.requires_grad for p in storage.tensors(site, "one").values()} == {trainable}
    assert site.lora_active == ()


def test_overwrite_keeps_the_parameters() -> None:
    site = add_adapter(nn.Linear(5, 7), "one", 2)
    before = storage.tensors(site, "one")
    values = {name: torch.full_like(p, 3.0) for name, p in before.items()}
    storage.overwrite(site, "one", values, Arithmetic(2, 9, False, 0.0, "activation"))
    for name, parameter in storage.tensors(site, "one").items():
        assert parameter is before[name]
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad
    assert site.lora_arithmetic["one"].scaling == 9


def test_removed_is_gone() -> None:
    site = add_adapter(nn.Linear(5, 7), "one", 2)
    site.activate(())
    storage.remove(site, "one")
    assert {name for name, _ in site.named_parameters()} == {"weight", "bias"}


def test_sites_and_base_modules() -> None:
    block = Block()
    add_adapter(block.gate, "one", 2)
    add_adapter(block.down, "one", 2)
    assert [fqn for fqn, _ in storage.sites(block)] == ["gate", "down"]
    assert list(storage.base_modules(block)) == ["gate", "up", "side", "down"]
