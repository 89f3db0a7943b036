"""Both gradients of a branch from one read: when, and that they are what they were."""

import pytest
import torch
from torch import Tensor

from lora_fx.passes.aten import share_gradient_reads as module
from lora_fx.passes.aten.share_gradient_reads import share_gradient_reads
from tests.dense import relative
from tests.passes.aten.on_gpu import cast, operators, rewritten, traced

M, N, R = 300, 600, 4
permute = torch.ops.aten.permute.default


@pytest.fixture(autouse=True)
def small_gradients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED", 0)


def inputs(rank: int = R, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in ((M, N), (N, rank), (M, rank))]


def gradients(dy, B, h):
    return torch.mm(dy, B) * 2, cast(torch.mm(permute(dy, [1, 0]), h), torch.float32)


def test_they_are_the_same_gradients() -> None:
    graph = rewritten(share_gradient_reads, traced(gradients, *inputs(), device="cuda"))
    assert "mm" not in operators(graph)
    got = graph(*inputs())
    want = gradients(*(i.double() for i in inputs()))
    plain = gradients(*inputs())
    for one, exact, rounded in zip(got, want, plain, strict=True):
        assert one.dtype == rounded.dtype
        assert relative(one, exact) <= 1.01 * relative(rounded, exact) + 1e-7
    dy, B, h = inputs()
    assert relative(graph(dy + 1, B, h)[0], want[0]) > 1e-2


def test_two_branches_of_one_output_are_two_pairs() -> None:
    def both(dy, B, h):
        return *gradients(dy, B, h), *gradients(dy, B * 3, h * 5)

    graph = rewritten(share_gradient_reads, traced(both, *inputs(), device="cuda"), made=2)
    for got, want in zip(graph(*inputs()), both(*inputs()), strict=True):
        assert relative(got, want) < 1e-2


def test_a_pair_may_read_what_another_made() -> None:
    def nested(dy, B, h):
        dh = torch.mm(dy, B)
        dB = torch.mm(permute(dy, [1, 0]), h)
        other = torch.tanh(dy)
        return dh, torch.mm(other, dB), torch.mm(permute(other, [1, 0]), dh)

    graph = rewritten(share_gradient_reads, traced(nested, *inputs(), device="cuda"), made=2)
    for got, want in zip(graph(*inputs()), nested(*inputs()), strict=True):
        assert relative(got, want) < 1e-2


def only_one(dy, B, h):
    return torch.mm(dy, B)


def late(dy, B, h):
    dh = torch.mm(dy, B)
    return torch.mm(permute(dy, [1, 0]), h * dh.sum())


@pytest.mark.parametrize(
    ("function", "rank", "dtype", "device"),
    [
        (only_one, R, torch.bfloat16, "cuda"),
        (late, R, torch.bfloat16, "cuda"),
        (gradients, 33, torch.bfloat16, "cuda"),
        (gradients, R, torch.float32, "cuda"),
        (gradients, R, torch.bfloat16, "cpu"),
    ],
    ids=["one-product", "needed-before", "large-rank", "float32", "cpu"],
)
def test_what_is_left_alone(function, rank: int, dtype: torch.dtype, device: str) -> None:
    graph = traced(function, *inputs(rank, dtype), device=device)
    rewritten(share_gradient_reads, graph, made=0)


def test_what_the_cache_holds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHED", M * N + 1)
    rewritten(share_gradient_reads, traced(gradients, *inputs(), device="cuda"), made=0)
