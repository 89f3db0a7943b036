"""Factors that are picked for samples, in both ways, beside stacking them one after another."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from lora_fx.graph.picked import pick, picked_on_device

RANKS, WIDTH, WIDEST = (2, 3, 1, 4), 5, 4
WHICH = torch.tensor([[0, -1], [3, 1], [0, 3], [-1, -1], [1, 0]])  # the third is nobody's
Pick = Callable[[list[Tensor], Tensor, int, bool], Tensor]
COLUMNS = pytest.mark.parametrize("columns", [False, True])


def factors(columns: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(WIDTH, r) if columns else (r, WIDTH) for r in RANKS]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def stacked(factors: list[Tensor], which: Tensor, rank: int, columns: bool) -> Tensor:
    """What is meant, one sample and term after another."""
    dim = 1 if columns else 0
    shape = (WIDTH, rank) if columns else (rank, WIDTH)
    rows = []
    for sample in which.tolist():
        terms = []
        for i in sample:
            own = factors[i] if i >= 0 else torch.zeros(shape, dtype=factors[0].dtype)
            lacks = rank - own.shape[dim]
            terms.append(F.pad(own, (0, lacks) if columns else (0, 0, 0, lacks)))
        rows.append(torch.cat(terms, dim))
    return torch.stack(rows)


def on_device(factors: list[Tensor], which: Tensor, rank: int, columns: bool) -> Tensor:
    return picked_on_device(factors, which, rank, columns, factors[0].dtype)


WAYS = pytest.mark.parametrize("way", [pick, on_device], ids=["pick", "on_device"])


@COLUMNS
@WAYS
def test_it_is_stacking_and_indexing(columns: bool, way: Pick) -> None:
    given = factors(columns)
    got, want = (f(given, WHICH, WIDEST, columns) for f in (way, stacked))
    assert got.shape == ((5, WIDTH, 2 * WIDEST) if columns else (5, 2 * WIDEST, WIDTH))
    assert torch.equal(got, want)
    assert not torch.equal(got, stacked(given, WHICH.flip(0), WIDEST, columns))
    d = torch.randn_like(got)
    own, theirs = (torch.autograd.grad(value, given, d, allow_unused=True) for value in (got, want))
    for i, (gradient, meant) in enumerate(zip(own, theirs, strict=True)):
        if i == 2:
            assert meant is None
            assert not gradient.any()
        else:
            assert meant.any()
            torch.testing.assert_close(gradient, meant)


@COLUMNS
def test_on_a_device_products_have_another_dtype_than_gradients(columns: bool) -> None:
    given = [factor.detach().float().requires_grad_() for factor in factors(columns)]
    given[1].requires_grad_(False)
    got = picked_on_device(given, WHICH, WIDEST, columns, torch.bfloat16)
    want = stacked([factor.bfloat16() for factor in given], WHICH, WIDEST, columns)
    assert torch.equal(got, want)
    d = torch.randn_like(got)
    trained = [given[0], given[3]]
    own = torch.autograd.grad(got, trained, d)
    same = torch.autograd.grad(stacked(given, WHICH, WIDEST, columns), trained, d.float())
    for a, b in zip(own, same, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b)


@COLUMNS
@WAYS
def test_by_finite_differences(columns: bool, way: Pick) -> None:
    assert torch.autograd.gradcheck(
        lambda *given: way(list(given), WHICH, WIDEST, columns), factors(columns)
    )


@COLUMNS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_keeps_the_rules_of_operators(columns: bool) -> None:
    opcheck(pick, (factors(columns), WHICH, WIDEST, columns))


@COLUMNS
@WAYS
def test_compiled_for_any_number_of_samples(columns: bool, way: Pick) -> None:
    given = factors(columns)
    given[1].requires_grad_(False)
    doubled = torch.compile(lambda f, w: 2 * way(f, w, WIDEST, columns), dynamic=True)
    for which in (WHICH, WHICH[1:4]):
        want = 2 * stacked(given, which, WIDEST, columns)
        got = doubled(given, which)
        assert torch.equal(got, want)
        trained = [given[i] for i in (0, 2, 3)]
        own, theirs = (
            torch.autograd.grad(v.square().sum(), trained, materialize_grads=True)
            for v in (got, want)
        )
        for a, b in zip(own, theirs, strict=True):
            torch.testing.assert_close(a, b)


@COLUMNS
def test_what_nobody_has_is_not_read(columns: bool) -> None:
    given = factors(columns)
    want = pick(given, WHICH, WIDEST, columns)
    given[2].data.fill_(torch.nan)
    assert torch.equal(pick(given, WHICH, WIDEST, columns), want)
    assert torch.equal(on_device(given, WHICH, WIDEST, columns), want)
