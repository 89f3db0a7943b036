"""A sum's low-rank term in the kernel of what follows: when, and that values are what they were."""

import pytest
import torch
from torch import Tensor

from lora_fx.passes.aten import accumulate_products as sums
from lora_fx.passes.aten import fuse_low_rank_terms as module
from lora_fx.passes.aten.accumulate_products import accumulate_products
from lora_fx.passes.aten.fuse_low_rank_terms import fuse_low_rank_terms
from tests.dense import relative
from tests.passes.aten.on_gpu import cast, operators, rewritten, traced

M, K, N, R = 12, 7, 10, 3
permute = torch.ops.aten.permute.default


@pytest.fixture(autouse=True)
def small_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_LEAST", 0)
    monkeypatch.setattr(module, "_LEAST", 0)


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(M, K), (K, N), (M, R), (R, N), (3, 4, N), (3, 4, N), (N, 5)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def total(dy, W, dS, A):
    return torch.mm(dS, A) + torch.mm(dy, W)


def gated(dy, W, dS, A, gate, up, V):
    """Return the gradients of a gated activation, in a product each, as a layer below has them."""
    gradient = total(dy, W, dS, A).view(3, 4, N)
    wide = cast(gate, torch.promote_types(gate.dtype, torch.float32))
    sigmoid = torch.sigmoid(wide)
    dup = gradient * cast(wide * sigmoid, dy.dtype)
    dgate = cast(gradient * up, wide.dtype) * sigmoid * (1 + wide * (torch.neg(sigmoid) + 1))
    flat = cast(dgate, dy.dtype).reshape(M, N)
    return dup.reshape(M, N) @ V, torch.mm(permute(flat, [1, 0]), dy)


def gelu(dy, W, dS, A, gate, up, V):
    return (total(dy, W, dS, A) * torch.erf(gate.reshape(M, N)) * 0.5) @ V


def fused(function, made: int = 1, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
    graph = traced(function, *inputs(dtype), device=device)
    accumulate_products(graph.graph)
    return rewritten(fuse_low_rank_terms, graph, made)


@pytest.mark.parametrize("function", [gated, gelu])
def test_they_are_the_same_values(function) -> None:
    graph = fused(function)
    assert "lora_fx.elementwise" in operators(graph)
    assert not {"lora_fx.sum_of_products", "mul.Tensor", "sigmoid"} & set(operators(graph))
    given = inputs()
    results = (graph(*given), function(*(i.double() for i in given)), function(*given))
    tuples = (one if isinstance(one, tuple) else (one,) for one in results)
    for got, exact, plain in zip(*tuples, strict=True):
        assert relative(got, exact) <= 1.05 * relative(plain, exact)
    dy, W, dS, *rest = given
    changed = graph(dy, W, dS * 2, *rest)
    first = changed[0] if isinstance(changed, tuple) else changed
    assert relative(first, function(*given)[0] if function is gated else function(*given)) > 1e-2


def test_more_products_stay_one_sum() -> None:
    def two(dy, W, dS, A, gate, up, V):
        both = total(dy, W, dS, A) + torch.mm(dy * 2, W)
        return torch.neg(both) @ V

    assert "lora_fx.sum_of_products" in operators(fused(two))


def test_a_sum_in_a_product_of_its_own_is_computed_once() -> None:
    def twice(dy, W, dS, A, gate, up, V):
        gradient = total(dy, W, dS, A)
        return gradient @ V, torch.neg(gradient) @ V

    graph, given = fused(twice), inputs(torch.float64)
    assert "lora_fx.sum_of_products" not in operators(graph)
    for got, exact in zip(graph(*given), twice(*given), strict=True):
        assert relative(got, exact) < 1e-12


def kept(dy, W, dS, A, gate, up, V):
    gradient = total(dy, W, dS, A)
    return gradient, torch.neg(gradient) @ V


def reduced(dy, W, dS, A, gate, up, V):
    return torch.neg(total(dy, W, dS, A)).sum(0)


def broadcast(dy, W, dS, A, gate, up, V):
    return (total(dy, W, dS, A) * gate.sum((0, 1))) @ V


def unknown(dy, W, dS, A, gate, up, V):
    return torch.atan(total(dy, W, dS, A)) @ V


def nothing(dy, W, dS, A, gate, up, V):
    return total(dy, W, dS, A) @ V


def later(dy, W, dS, A, gate, up, V):
    down = torch.neg(total(dy, W, dS, A))
    first = down @ V
    return first, (down * (gate.reshape(M, N) @ (V @ permute(V, [1, 0])) * first.sum())) @ V


def multiplied_by_its_product(dy, W, dS, A, gate, up, V):
    down = torch.neg(total(dy, W, dS, A))
    return (down * (down @ (V @ permute(V, [1, 0])))) @ V


def in_float32(dy, W, dS, A, gate, up, V):
    down = torch.neg(total(dy, W, dS, A))
    return down @ V, cast(down, torch.float32) @ cast(V, torch.float32)


def times_infinity(dy, W, dS, A, gate, up, V):
    return (total(dy, W, dS, A) * float("inf")) @ V


LEFT_ALONE = [kept, reduced, broadcast, unknown, nothing, later, multiplied_by_its_product]


@pytest.mark.parametrize("function", [*LEFT_ALONE, in_float32, times_infinity])
def test_what_is_left_alone(function) -> None:
    fused(function, made=0)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)], ids=["cpu", "float32"]
)
def test_where_it_is_left_alone(device: str, dtype: torch.dtype) -> None:
    fused(gelu, made=0, device=device, dtype=dtype)


def test_small_sums_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST", M * N + 1)
    fused(gelu, made=0)
