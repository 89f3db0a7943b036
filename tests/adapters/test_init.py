"""How adapters start: the distribution, and what the draw depends on."""

import math

import pytest
import torch

import lora_fx
from lora_fx.adapters.init import METHODS as ALL
from lora_fx.adapters.init import generator_of
from tests.tiny import llama

METHODS = ALL["linear"]
IN, OUT, RANK = 307, 211, 102


def draw(method: str, seed: int = 0, adapter: str = "default", fqn: str = "a.b"):
    return METHODS[method](IN, OUT, RANK, generator_of(seed, adapter, fqn))


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_dtype(method: str) -> None:
    A, B = draw(method)
    assert (A.shape, B.shape) == ((RANK, IN), (OUT, RANK))
    assert A.dtype is B.dtype is torch.float32


@pytest.mark.parametrize("method", ["default", "random"])
def test_a_is_uniform(method: str) -> None:
    A, _ = draw(method)
    bound = 1 / math.sqrt(IN)
    assert 0.999 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(A.mean().item()) < 0.02 * bound


def test_gaussian() -> None:
    A, _ = draw("gaussian")
    assert A.std().item() == pytest.approx(1 / RANK, rel=0.02)
    assert A.abs().max() > 3.5 / RANK


@pytest.mark.parametrize("method", ["default", "gaussian"])
def test_b_is_zero(method: str) -> None:
    assert not draw(method)[1].any()


def test_b_of_random_is_uniform() -> None:
    _, B = draw("random")
    bound = 1 / math.sqrt(RANK)
    assert 0.999 * bound < B.abs().max() <= bound
    assert B.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_it_depends_on_seed_adapter_and_name_only(method: str) -> None:
    torch.manual_seed(1)
    A, _ = draw(method)
    torch.manual_seed(2)
    assert torch.equal(draw(method)[0], A)
    for other in ({"seed": 1}, {"adapter": "x"}, {"fqn": "a.c"}):
        assert (
            abs(torch.corrcoef(torch.stack([draw(method, **other)[0].ravel(), A.ravel()]))[0, 1])
            < 0.03
        )


def test_it_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw("random")
    assert torch.equal(torch.get_rng_state(), before)


def test_another_target_changes_no_other_site() -> None:
    def parameters(targets: str) -> dict[str, torch.Tensor]:
        text = f"lora 1\nadapter default {{ rank = 3 init = random target {targets} }}"
        model = lora_fx.compile(llama(), text, backend=None)
        return {n: p for n, p in model.named_parameters() if "lora_" in n}

    few, many = parameters("q_proj"), parameters("linear")
    assert few.keys() < many.keys()
    assert all(torch.equal(parameter, many[name]) for name, parameter in few.items())
