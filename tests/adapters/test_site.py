"""A site computes base(x) + Σ s B A x of its active adapters."""

import pytest
import torch
from torch import nn

from tests.dense import adapted_linear, relative
from tests.marked import add_adapter


def branch(site: nn.Module, name: str) -> tuple[float, torch.Tensor, torch.Tensor]:
    scaling = site.lora_arithmetic[name].scaling
    return scaling, site.lora_A[name].weight, site.lora_B[name].weight


@pytest.fixture
def site() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(11, 7)
    add_adapter(linear, "one", 2, scaling=0.7)
    add_adapter(linear, "two", 3, scaling=-1.9)
    return add_adapter(linear, "three", 5, scaling=0.3)


@pytest.mark.parametrize("active", [("one",), ("two", "one"), ("one", "two", "three")])
def test_the_dense_reference(active: tuple[str, ...], site: nn.Module) -> None:
    site.activate(active)
    x = torch.randn(3, 13, 11)
    want = adapted_linear(x, site.weight, site.bias, [branch(site, name) for name in active])
    assert relative(site(x), want) <= 1e-6
    assert relative(adapted_linear(x, site.weight, site.bias, []), want) > 0.1


def test_without_active_adapters_it_is_the_base(site: nn.Module) -> None:
    x = torch.randn(3, 11)
    for active in ((), ("elsewhere",)):
        site.activate(active)
        assert torch.equal(site(x), nn.functional.linear(x, site.weight, site.bias))


def test_an_adapter_whose_b_is_zero_changes_nothing(site: nn.Module) -> None:
    x = torch.randn(3, 11)
    site.activate(("one",))
    with torch.no_grad():
        site.lora_B["one"].weight.zero_()
    assert torch.equal(site(x), nn.functional.linear(x, site.weight, site.bias))


@pytest.mark.parametrize(("compute", "bound"), [("activation", 2e-2), ("float32", 3e-3)])
def test_compute_dtype(compute: str, bound: float) -> None:
    """In bfloat16 with W = 0; computed in float32, only x and the result are rounded."""
    torch.manual_seed(0)
    linear = nn.Linear(11, 7, bias=False)
    nn.init.zeros_(linear.weight)
    site = add_adapter(linear, "one", 5, compute=compute)
    linear.weight.data = linear.weight.data.bfloat16()
    x = torch.randn(101, 11).bfloat16()
    want = adapted_linear(x, linear.weight, None, [branch(site, "one")])
    got = site(x)
    assert got.dtype is torch.bfloat16
    error = relative(got, want)
    assert error <= bound
    if compute == "activation":
        assert error > 3e-3


def test_dropout_is_of_the_branch_and_of_training_only() -> None:
    torch.manual_seed(0)
    site = add_adapter(nn.Linear(11, 7), "one", 5, dropout=0.5)
    x = torch.randn(3, 11)
    want = adapted_linear(x, site.weight, site.bias, [branch(site, "one")])
    assert relative(site.eval()(x), want) <= 1e-6
    site.train()
    mean = torch.stack([site(x) for _ in range(4000)]).mean(0)
    assert relative(site(x), want) > 1e-2
    assert relative(mean, want) < 2e-2


def test_gradients_reach_only_what_is_active(site: nn.Module) -> None:
    site.activate(("two",))
    site(torch.randn(3, 11)).square().sum().backward()
    with_gradient = {n for n, p in site.named_parameters() if p.grad is not None}
    assert {"lora_A.two.weight", "lora_B.two.weight"} <= with_gradient
    assert not any("one" in name or "three" in name for name in with_gradient)
