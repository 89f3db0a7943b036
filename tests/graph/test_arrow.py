"""Shares of tokens: `lora_fx::arrow`, and a site whose branches have them."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from lora_fx.graph import ops
from lora_fx.graph.structure import Branch, Structure
from tests.dense import relative

SCALINGS = (0.5, -1.25, 2.0)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, dtype=dtype), torch.randn(3, 5, dtype=dtype)


def by_token(x: Tensor, prototypes: Tensor, top: int, temperature: float) -> Tensor:
    """One token at a time, one adapter at a time."""
    found = torch.zeros(len(x), len(prototypes), dtype=torch.float64)
    for row, token in enumerate(x.double()):
        z = [abs(float(token @ one)) for one in prototypes.double()]
        best = sorted(range(len(z)), key=lambda i: -z[i])[:top]
        powers = {i: torch.tensor(z[i] / temperature, dtype=torch.float64).exp() for i in best}
        for i in best:
            found[row, i] = powers[i] / sum(powers.values())
    return found


@pytest.mark.parametrize("top", [1, 2, 3, 5])
def test_shares_are_a_softmax_over_the_largest(top: int) -> None:
    x, prototypes = inputs()
    got = ops.arrow(x, prototypes, top, 0.5)
    want = by_token(x.flatten(0, 1), prototypes, top, 0.5).view(2, 4, 3)
    assert torch.allclose(got, want, atol=1e-12)
    assert torch.allclose(got.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert ((got > 0).sum(-1) == min(top, 3)).all()
    assert torch.equal(ops.arrow(x, -prototypes, top, 0.5), got)
    if top > 1:
        assert relative(ops.arrow(x, prototypes, top, 0.7), want) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_compared_in_the_wider_dtype_under_autocast_too(dtype: torch.dtype) -> None:
    x, prototypes = (t.float() for t in inputs())
    want = ops.arrow(x.to(dtype).float(), prototypes, 2, 0.5)
    got = ops.arrow(x.to(dtype), prototypes, 2, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ops.arrow(x.to(dtype), prototypes, 2, 0.5)
    for one in (got, under):
        assert one.dtype is torch.float32
        assert torch.equal(one, want)


def site(top: int, x: Tensor, *rest: Tensor) -> Tensor:
    prototypes, *params = rest
    key = str(Structure("linear", (Branch(2), Branch(3), Branch(1)), arrow=(top, 0.5)))
    y = x.new_ones(*x.shape[:-1], 7)
    scalings = torch.tensor(SCALINGS, dtype=x.dtype)
    return ops.site(y, x, params, scalings, key, [], None, None, prototypes)


def factors() -> list[Tensor]:
    shapes = [(2, 5), (7, 2), (3, 5), (7, 3), (1, 5), (7, 1)]
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("top", [2, 3])
def test_a_site_adds_each_branch_by_its_share(top: int) -> None:
    x, prototypes = inputs()
    params = factors()
    shares = by_token(x.flatten(0, 1), prototypes, top, 0.5).view(2, 4, 3)
    want = torch.ones(2, 4, 7, dtype=torch.float64)
    for i, s in enumerate(SCALINGS):
        want += s * shares[..., i : i + 1] * (x @ params[2 * i].T @ params[2 * i + 1].T)
    assert relative(site(top, x, prototypes, *params), want) < 1e-12
    assert relative(site(1, x, prototypes, *params), want) > 1e-2


@pytest.mark.parametrize("top", [1, 2, 3])
def test_gradients_are_finite_differences(top: int) -> None:
    tensors = [t.requires_grad_() for t in (*inputs(), *factors())]
    assert torch.autograd.gradcheck(lambda *given: site(top, *given), tensors)


def test_the_operator_has_a_schema_and_runs_on_fakes() -> None:
    args = (*inputs(torch.float32), 2, 0.5)
    opcheck(ops.arrow, args, test_utils=("test_schema", "test_faketensor"))


def test_a_structure_says_it() -> None:
    structure = Structure("linear", (Branch(2),), terms=3, arrow=(2, 1e-07))
    assert str(structure) == "linear~3^2/1e-07[r2:p0.0:activation]"
    assert Structure.parse(str(structure)) == structure
