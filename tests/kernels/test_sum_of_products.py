"""Products that add themselves up."""

import pytest
import torch

from lora_fx.kernels.sum_of_products import sum_of_products
from tests.dense import relative


def inputs(dtype: torch.dtype, device: str = "cpu"):
    torch.manual_seed(0)
    left = [torch.randn(9, k, device=device).to(dtype) for k in (2, 7, 30)]
    right = [torch.randn(5, k, device=device).to(dtype).t() for k in (2, 7, 30)]
    return left, right, torch.randn(5, device=device).to(dtype)


def exact(left, right, bias=None):
    total = sum(p.double() @ q.double() for p, q in zip(left, right, strict=True))
    return total if bias is None else total + bias.double()


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (torch.float64, "cpu"),
        (torch.float32, "cpu"),
        (torch.bfloat16, "cpu"),
        pytest.param(torch.bfloat16, "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_sum(dtype: torch.dtype, device: str, biased: bool) -> None:
    left, right, bias = inputs(dtype, device)
    more = (bias,) if biased else ()
    got = sum_of_products(left, right, *more)
    assert got.dtype == dtype
    assert relative(got, exact(left, right, *more)) < 4 * torch.finfo(dtype).eps
    assert relative(got, exact(left[1:], right[1:], *more)) > 1e-2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_of_each_sample(first: bool, biased: bool) -> None:
    left, right, bias = inputs(torch.float64)
    own = torch.randn(3, 3, 4).double(), torch.randn(3, 4, 5).double()
    more = (bias,) if biased else ()
    place = 0 if first else 1
    wider = [[*x[:place], y, *x[place:]] for x, y in zip((left, right), own, strict=True)]
    got = sum_of_products(*wider, *more)
    want = exact(left, right, *more) + torch.bmm(*own).flatten(0, 1)
    assert relative(got, want) < 1e-14
    assert relative(got, exact(left, right, *more)) > 1e-2


def test_the_operator_keeps_its_promises() -> None:
    left, right, bias = inputs(torch.float32)
    torch.library.opcheck(sum_of_products, (left, right))
    torch.library.opcheck(sum_of_products, (left, right, bias))
    torch.library.opcheck(
        sum_of_products, ([torch.randn(3, 3, 4), *left], [torch.randn(3, 4, 5), *right])
    )
