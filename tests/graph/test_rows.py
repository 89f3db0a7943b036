"""Rows that are followed are those that a result's rows depend on: autograd says which."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph.rows import rows_after

R, m, n = 4, 3, 5
INDEX = torch.tensor([2, 0, 3, 3, 1])
MASK = torch.tensor([True, False, True, True])
STACK = torch.randn(R, m, n, generator=torch.Generator().manual_seed(1))
FLAT = (R, m)
DEEP = (R, 2, m)

KNOWN: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "an activation": ("silu", FLAT, (), {}),
    "a factor for each row": ("mul", FLAT, (torch.randn(R, 1),), {}),
    "a bias": ("__add__", FLAT, (torch.randn(m),), {}),
    "in place": ("add_", FLAT, (torch.randn(m),), {}),
    "a dtype": ("to", FLAT, (torch.float32,), {}),
    "picked": ("__getitem__", FLAT, (INDEX,), {}),
    "picked by a mask": ("__getitem__", FLAT, (MASK,), {}),
    "a slice": ("__getitem__", FLAT, (slice(1, 3),), {}),
    "every other column": ("__getitem__", FLAT, ((Ellipsis, slice(None, None, 2)),), {}),
    "some columns": ("__getitem__", DEEP, ((slice(None), 0, None),), {}),
    "repeated": ("repeat_interleave", FLAT, (3,), {"dim": 0}),
    "unfolded": ("view", DEEP, (-1, m), {}),
    "folded behind": ("reshape", DEEP, (R, -1), {}),
    "flattened": ("flatten", DEEP, (0, 1), {}),
    "flattened behind": ("flatten", DEEP, (1,), {}),
    "one more dimension": ("unsqueeze", FLAT, (-1,), {}),
    "one less": ("squeeze", (R, 1, m), (1,), {}),
    "halves": ("chunk", (R, 2 * m), (2,), {"dim": -1}),
    "pieces": ("split", (R, 2 * m), (m, 1), {}),
    "a mean": ("mean", FLAT, (-1,), {"keepdim": True}),
    "a norm": ("rms_norm", FLAT, ((m,),), {}),
    "a layer": ("linear", FLAT, (torch.randn(n, m),), {}),
    "a product": ("matmul", FLAT, (torch.randn(m, n),), {}),
    "a batch of products": ("bmm", DEEP, (STACK,), {}),
}
UNKNOWN: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "turned": ("transpose", (R, R), (0, 1), {}),
    "reversed": ("flip", FLAT, (0,), {}),
    "rolled": ("roll", FLAT, (1, 0), {}),
    "folded": ("view", (R, 4), (2, 8), {}),
    "a row in front": ("__getitem__", FLAT, (None,), {}),
    "one row": ("__getitem__", FLAT, (1,), {}),
    "rows in another order": ("__getitem__", FLAT, ((INDEX,),), {}),
    "one of each": ("__getitem__", (R, R), ((slice(None), torch.arange(R)),), {}),
    "a dimension in front": ("unsqueeze", FLAT, (0,), {}),
    "a sum of rows": ("sum", FLAT, (0,), {"keepdim": True}),
    "a sum of all": ("sum", FLAT, (), {}),
    "a sum by place": ("cumsum", FLAT, (0,), {}),
    "a softmax over rows": ("softmax", FLAT, (0,), {}),
    "pieces of rows": ("split", FLAT, (2,), {}),
    "repeated whole": ("repeat", FLAT, (2, 1), {}),
    "all repeated": ("repeat_interleave", FLAT, (2,), {}),
    "a norm of all": ("layer_norm", FLAT, (FLAT,), {}),
    "broadcast": ("add", FLAT, (torch.randn(R, R, m),), {}),
    "many products": ("matmul", FLAT, (STACK,), {}),
}


def function(name: str) -> Callable[..., Any]:
    return getattr(Tensor, name, None) or getattr(F, name, None) or getattr(torch, name)


def dependencies(result: Tensor, x: Tensor) -> Tensor:
    """Which rows of x each row of the result depends on: bool (rows of the result, R)."""
    found = []
    for row in result:
        weights = torch.rand(row.shape, generator=torch.Generator().manual_seed(0)) + 1
        (gradient,) = torch.autograd.grad((row * weights).sum(), x, retain_graph=True)
        found.append(gradient.flatten(1).abs().sum(1) > 0)
    return torch.stack(found)


@pytest.mark.parametrize("case", KNOWN)
def test_what_is_followed_depends_on_no_other_row(case: str) -> None:
    name, shape, rest, named = KNOWN[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), requires_grad=True)
    given = x.clone()
    results = function(name)(given, *rest, **named)
    for result in results if isinstance(results, tuple | list) else (results,):
        of = rows_after(name, 0, torch.arange(R), (x, *rest), named, result)
        assert of is not None
        assert len(of) == len(result)
        seen = dependencies(result, x)
        assert seen.any()
        others = torch.arange(R) != of.unsqueeze(1)
        assert not (seen & others).any()
        wrong = torch.arange(R) != of.roll(1).unsqueeze(1)
        assert (seen & wrong).any()


@pytest.mark.parametrize("case", UNKNOWN)
def test_of_anything_else_nothing_is_said(case: str) -> None:
    name, shape, rest, named = UNKNOWN[case]
    x = torch.randn(shape)
    results = function(name)(x, *rest, **named)
    for result in results if isinstance(results, tuple | list) else (results,):
        assert rows_after(name, 0, torch.arange(R), (x, *rest), named, result) is None


def test_rows_that_are_summed_over_are_no_rows() -> None:
    """Where the matrix stands in front, rows are features; slices of a batch stay apart."""
    x, matrix = torch.randn(R, m), torch.randn(R, R)
    of = torch.arange(R)
    assert rows_after("matmul", 1, of, (matrix, x), {}, matrix @ x) is None
    assert rows_after("addmm", 2, of, (x, matrix, x), {}, torch.addmm(x, matrix, x)) is None
    assert rows_after("linear", 1, of, (x, x), {}, F.linear(x, x)) is None
    many = torch.randn(R, m, 2)
    assert rows_after("bmm", 1, of, (STACK.mT, many), {}, torch.bmm(STACK.mT, many)) is of
