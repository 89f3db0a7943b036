"""Sums of products: which are joined, in which order, and that they are what they were."""

import pytest
import torch
from torch import Tensor

from lora_fx.passes.aten import accumulate_products as module
from lora_fx.passes.aten.accumulate_products import accumulate_products
from tests.dense import relative
from tests.passes.aten.on_gpu import operators, rewritten, traced

M, K, R, N = 12, 7, 2, 5


@pytest.fixture(autouse=True)
def small_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST", 0)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 4, K), (K, N), (M, R), (R, N), (3, 4, N), (N,)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def base_and_branch(x, W, h, B, y, bias):
    base = torch.mm(x.view(M, K), W).view(3, 4, N)
    return base + torch.mm(h, B).view(3, 4, N)


def two_branches(x, W, h, B, y, bias):
    return base_and_branch(x, W, h, B, y, bias) + torch.mm(h * 2, B).view(3, 4, N)


def with_a_bias(x, W, h, B, y, bias):
    return torch.addmm(bias, x.view(M, K), W) + torch.mm(h, B)


def two_biases(x, W, h, B, y, bias):
    return torch.addmm(bias, x.view(M, K), W) + torch.addmm(bias * 2, h, B)


def into_a_residual(x, W, h, B, y, bias):
    return y + base_and_branch(x, W, h, B, y, bias)


def with_one_of_each_sample(x, W, h, B, y, bias):
    own = torch.bmm(h.view(3, 4, R), torch.stack([B, -B, 2 * B]))
    return torch.addmm(bias, x.view(M, K), W).view(3, 4, N) + own


def flattened(x, W, h, B, y, bias):
    own = torch.bmm(h.view(3, 4, R), torch.stack([B, -B, 2 * B]))
    return torch.mm(x.view(M, K), W) + own.view(M, N)


@pytest.mark.parametrize(
    "function",
    [
        base_and_branch,
        two_branches,
        with_a_bias,
        into_a_residual,
        with_one_of_each_sample,
        flattened,
    ],
    ids=lambda f: f.__name__,
)
def test_it_is_the_same_sum(function) -> None:
    graph = rewritten(accumulate_products, traced(function, *inputs()))
    assert "mm" not in operators(graph)
    assert "addmm" not in operators(graph)
    assert "bmm" not in operators(graph)
    got, want = graph(*inputs()), function(*inputs())
    assert relative(got, want) < 1e-14
    x, *rest = inputs()
    assert relative(graph(x + 1, *rest), want) > 1e-2


def test_small_inner_dimensions_go_first() -> None:
    graph = rewritten(accumulate_products, traced(base_and_branch, *inputs()))
    (call,) = (node for node in graph.graph.nodes if "sum_of_products" in str(node.target))
    left, right = call.args
    assert [one.meta["val"].shape[1] for one in left] == [R, K]
    assert [one.meta["val"].shape[0] for one in right] == [R, K]
    assert operators(graph) == ["view", "lora_fx.sum_of_products", "reshape"]


def test_a_residual_stays_added() -> None:
    graph = rewritten(accumulate_products, traced(into_a_residual, *inputs()))
    assert operators(graph)[-1] == "add.Tensor"


def of_each_sample_alone(x, W, h, B, y, bias):
    own = torch.stack([B, -B, 2 * B])
    return torch.bmm(h.view(3, 4, R), own) + torch.bmm(2 * h.view(3, 4, R), own)


def read_twice(x, W, h, B, y, bias):
    base = torch.mm(x.view(M, K), W)
    return base + torch.mm(h, B), base * 2


def twice_itself(x, W, h, B, y, bias):
    base = torch.mm(x.view(M, K), W)
    return base + base


def scaled(x, W, h, B, y, bias):
    return torch.add(torch.mm(x.view(M, K), W), torch.mm(h, B), alpha=3)


def wider(x, W, h, B, y, bias):
    return torch.mm(x.view(M, K), W) + torch.mm(h.float(), B.float())


def spread(x, W, h, B, y, bias):
    return torch.mm(x.view(M, K), W) + torch.mm(h[:1], B)


@pytest.mark.parametrize(
    "function",
    [two_biases, read_twice, twice_itself, scaled, wider, spread, of_each_sample_alone],
    ids=lambda f: f.__name__,
)
def test_what_is_left_alone(function) -> None:
    graph = traced(function, *inputs())
    before = operators(graph)
    rewritten(accumulate_products, graph, made=0)
    assert operators(graph) == before


def test_small_sums_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST", M * N + 1)
    rewritten(accumulate_products, traced(base_and_branch, *inputs()), made=0)
    monkeypatch.setattr(module, "_LEAST", M * N)
    rewritten(accumulate_products, traced(base_and_branch, *inputs()))


def test_half_precision_is_no_worse_than_the_plain_sum() -> None:
    errors = {}
    for name, rewrite in (("plain", False), ("accumulated", True)):
        given = [i.bfloat16() for i in inputs()]
        graph = traced(two_branches, *given)
        if rewrite:
            rewritten(accumulate_products, graph)
        errors[name] = relative(graph(*given), two_branches(*(i.double() for i in given)))
    assert errors["accumulated"] < 1.2 * errors["plain"]
    assert errors["accumulated"] > 0
