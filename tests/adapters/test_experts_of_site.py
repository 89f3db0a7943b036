"""Prototypes of adapters, and what is subtracted of them."""

import pytest
import torch
from torch import nn

from lora_fx.adapters.sites.experts import Experts, prototype
from lora_fx.adapters.sites.factors import Factors
from lora_fx.adapters.storage import factor

SHAPES = [(2, 5, 7), (3, 7, 5), (5, 5, 7), (6, 5, 7), (9, 7, 5), (1, 3, 4)]  # rank, in, out


def dense(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(B.double() @ A.double()).Vh[0]


def drawn(rank: int, inputs: int, outputs: int, seed: int = 0) -> Factors:
    made = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*s, generator=made) for s in [(rank, inputs), (outputs, rank)])
    return Factors(factor(A, None, False), factor(B, None, False))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_first_right_singular_vector(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    one = drawn(*shape)
    A, B = one.A.weight.to(dtype), one.B.weight.to(dtype)
    got, want = prototype(A, B), dense(A, B)
    assert got.dtype is torch.promote_types(dtype, torch.float32)
    assert abs(float(got.double() @ want)) == pytest.approx(1, abs=1e-6)
    assert got.norm() == pytest.approx(1, abs=1e-6)


def test_nothing_has_no_direction_and_what_is_not_finite_none_that_is() -> None:
    A, B = torch.randn(2, 5), torch.randn(7, 2)
    assert torch.equal(prototype(A, torch.zeros_like(B)), torch.zeros(5))
    assert prototype(A * torch.inf, B).isnan().all()
    assert prototype(A.to("meta"), B.to("meta")).shape == (5,)


def test_general_knowledge_is_subtracted_factor_by_factor() -> None:
    one, *general = (drawn(3, 7, 5, seed) for seed in range(3))
    held = Experts(["a"], [one], general)
    for name in ("A", "B"):
        own = getattr(one, name).weight.clone()
        mean = sum(getattr(g, name).weight for g in general) / 2
        difference = getattr(held.branches[0], name).weight
        assert torch.allclose(difference, own - mean)
        assert torch.equal(getattr(one, name).weight, own)
    want = dense(held.branches[0].A.weight, held.branches[0].B.weight)
    assert abs(float(held.prototypes[0].double() @ want)) == pytest.approx(1, abs=1e-6)
    assert abs(float(held.prototypes[0].double() @ dense(one.A.weight, one.B.weight))) < 0.99
    assert not held.state_dict()
    assert not list(held.parameters())


def test_it_is_of_values_as_they_are() -> None:
    one, other, general = (drawn(3, 7, 5, seed) for seed in range(3))
    held = Experts(["a", "b"], [one, other], [general])
    assert held.is_of(["a", "b"], [one, other], [general])
    assert not held.is_of(["b", "a"], [other, one], [general])
    assert not held.is_of(["a", "b"], [one, other], [])
    with torch.no_grad():
        general.A.weight.mul_(2)
    assert not held.is_of(["a", "b"], [one, other], [general])
    held = Experts(["a", "b"], [one, other], [])
    nn.Module.double(one.B)
    assert not held.is_of(["a", "b"], [one, other], [])
