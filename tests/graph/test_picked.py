"""Factors that are picked for samples, beside stacking and indexing, which is what they mean."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lora_fx.graph.picked import pick, stacked, stacked_backward

RANKS, WIDTH, WIDEST = (2, 3, 1, 4), 5, 4
WHICH = torch.tensor([[0, -1], [3, 1], [0, 3], [-1, -1], [1, 0]])  # the third is nobody's
COLUMNS = pytest.mark.parametrize("columns", [False, True])


def factors(columns: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(WIDTH, r) if columns else (r, WIDTH) for r in RANKS]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@COLUMNS
def test_it_is_stacking_and_indexing(columns: bool) -> None:
    given = factors(columns)
    got, want = (f(given, WHICH, WIDEST, columns) for f in (pick, stacked))
    assert got.shape == ((5, WIDTH, 2 * WIDEST) if columns else (5, 2 * WIDEST, WIDTH))
    assert torch.equal(got, want)
    assert not torch.equal(got, stacked(given, WHICH.flip(0), WIDEST, columns))
    d = torch.randn_like(got)
    own, theirs = (torch.autograd.grad(value, given, d) for value in (got, want))
    alone = stacked_backward(d, WHICH, WIDEST, columns, list(RANKS), [0, 1, 2, 3])
    for i, gradients in enumerate(zip(own, theirs, alone, strict=True)):
        torch.testing.assert_close(gradients[0], gradients[1])
        torch.testing.assert_close(gradients[2], gradients[1])
        assert gradients[0].any() == (i != 2)


@COLUMNS
def test_by_finite_differences(columns: bool) -> None:
    assert torch.autograd.gradcheck(
        lambda *given: pick(list(given), WHICH, WIDEST, columns), factors(columns)
    )


@COLUMNS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_keeps_the_rules_of_operators(columns: bool) -> None:
    opcheck(pick, (factors(columns), WHICH, WIDEST, columns))


@COLUMNS
def test_compiled_for_any_number_of_samples(columns: bool) -> None:
    given = factors(columns)
    given[1].requires_grad_(False)
    doubled = torch.compile(lambda f, w: 2 * pick(f, w, WIDEST, columns), dynamic=True)
    for which in (WHICH, WHICH[1:4]):
        want = 2 * stacked(given, which, WIDEST, columns)
        got = doubled(given, which)
        assert torch.equal(got, want)
        trained = [given[i] for i in (0, 2, 3)]
        own, theirs = (torch.autograd.grad(v.square().sum(), trained) for v in (got, want))
        for a, b in zip(own, theirs, strict=True):
            torch.testing.assert_close(a, b)


@COLUMNS
def test_what_nobody_has_is_not_read(columns: bool) -> None:
    given = factors(columns)
    want = pick(given, WHICH, WIDEST, columns)
    given[2].data.fill_(torch.nan)
    assert torch.equal(pick(given, WHICH, WIDEST, columns), want)
    assert torch.equal(stacked(given, WHICH, WIDEST, columns), want)
