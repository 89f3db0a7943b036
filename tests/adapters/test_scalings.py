"""Scalings are made anew where they are not right, and stay the very tensor where they are."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.marked import add_adapter


@pytest.fixture
def site() -> nn.Module:
    linear = nn.Linear(11, 7)
    add_adapter(linear, "one", 2, scaling=0.75)
    add_adapter(linear, "two", 3, scaling=-1.5)
    return add_adapter(linear, "alike", 5, scaling=0.75)


def scalings(site: nn.Module, *active: str) -> Tensor:
    site.activate(active)
    return site.lora_scalings


def test_to_switch_off_and_on_makes_none(site: nn.Module) -> None:
    before = scalings(site, "one", "two")
    assert before.tolist() == [0.75, -1.5]
    site.activate(())
    assert scalings(site, "one", "two") is before
    assert scalings(site, "alike", "two") is before
    assert scalings(site, "two", "one") is not before
    assert site.lora_scalings.tolist() == [-1.5, 0.75]


def test_they_are_right_after_what_changes_tensors(site: nn.Module) -> None:
    site.activate(("one",))
    for changed in (site.bfloat16(), site.double(), copy.deepcopy(site).float()):
        assert changed.lora_scalings.dtype is torch.float32
        assert changed.lora_scalings.tolist() == [0.75]
    emptied = site.to_empty(device="cpu")
    assert emptied.lora_scalings.tolist() == [0.75]
    site.lora_scalings = torch.zeros(1)
    assert scalings(site, "one").tolist() == [0.75]


def test_what_was_written_to_is_made_anew(site: nn.Module) -> None:
    site.activate(("one",))
    site.lora_scalings.fill_(7)  # as averaging models, and DDP, do
    assert scalings(site, "one").tolist() == [0.75]


def test_they_can_be_trained_with_though_made_in_inference_mode(site: nn.Module) -> None:
    with torch.inference_mode():
        site.activate(("two",))
    assert not site.lora_scalings.is_inference()
