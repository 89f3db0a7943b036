"""Layers and their branches in one product: when, and that they are what they were."""

import pytest
import torch
from torch import Tensor

from lora_fx.graph.room import ROOM, has_room, owns_room, room_of, with_room
from lora_fx.passes.aten import accumulate_products as sums
from lora_fx.passes.aten.accumulate_products import accumulate_products
from lora_fx.passes.aten.augment_products import augment_products
from tests.dense import relative
from tests.passes.aten.on_gpu import operators, rewritten, traced

M, K, N, P = 12, 7, 5, 6
R, Q = 3, 2
permute = torch.ops.aten.permute.default


@pytest.fixture(autouse=True)
def small_sums_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_LEAST", 0)


def inputs(room: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 4, K), (N, K), (P, K), (R + Q, K), (N, R), (P, Q), (N,)]
    z, W, V, A, B, C, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [z, *(with_room(w) if room else w for w in (W, V)), A, B, C, bias]


def two_layers(z, W, V, A, B, C, bias):
    x = torch.tanh(z).view(M, K)
    first, second = torch.split(torch.mm(x, permute(A, [1, 0])), [R, Q], 1)
    y = torch.mm(x, permute(W, [1, 0])) + torch.mm(first, permute(B, [1, 0]))
    v = torch.mm(x, permute(V, [1, 0])) + torch.mm(second.view(M, Q), permute(C * 2, [1, 0]))
    return y, v, x


def with_a_bias(z, W, V, A, B, C, bias):
    x = torch.tanh(z).view(M, K)
    h = torch.mm(x, permute(A[:R], [1, 0]))
    return torch.addmm(bias, x, permute(W, [1, 0])) + torch.mm(h, permute(B, [1, 0]))


def two_branches(z, W, V, A, B, C, bias):
    x = torch.tanh(z).view(M, K)
    h = torch.mm(x, permute(A[:R], [1, 0]))
    branches = torch.mm(h, permute(B, [1, 0])) + torch.mm(h * 2, permute(B * 3, [1, 0]))
    return torch.mm(x, permute(W, [1, 0])) + branches


def augmented(function, given: list[Tensor], made: int = 1):
    graph = traced(function, *given)
    accumulate_products(graph.graph)
    return rewritten(augment_products, graph, made)


@pytest.mark.parametrize("function", [two_layers, with_a_bias, two_branches])
def test_they_are_the_same_values(function) -> None:
    graph = augmented(function, inputs())
    given = inputs()
    room_of(given[1]).fill_(float("nan"))  # what lies there before is nobody's
    got, want = graph(*given), function(*inputs(room=False))
    got, want = (one if isinstance(one, tuple) else (one,) for one in (got, want))
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-14
    for one, other in zip(given, inputs(), strict=True):
        assert torch.equal(one, other)
    z, *rest = inputs()
    assert relative(graph(z + 1, *rest)[0], want[0]) > 1e-2


def test_layers_of_one_input_share_it() -> None:
    graph = augmented(two_layers, inputs())
    assert operators(graph).count("lora_fx.augmented_products") == 1
    assert operators(graph).count("copy_") == 2  # x and h, into one matrix
    assert "lora_fx.sum_of_products" not in operators(graph)


def by_a_product(z, W, V, A, B, C, bias):
    x = torch.mm(
        z.view(M, K), permute(V[:, :P] @ V[:, :P], [1, 0])[:, :1].expand(P, K)[:1].expand(K, K)
    )
    h = torch.mm(x, permute(A[:R], [1, 0]))
    return torch.mm(x, permute(W, [1, 0])) + torch.mm(h, permute(B, [1, 0]))


def transposed(z, W, V, A, B, C, bias):
    x = torch.tanh(z).view(M, K)
    h = torch.mm(x, permute(A[:R], [1, 0]))
    return torch.mm(x, permute(W * 2, [1, 0])) + torch.mm(h, permute(B, [1, 0]))


@pytest.mark.parametrize(
    ("function", "room"),
    [(two_layers, False), (by_a_product, True), (transposed, True)],
    ids=["no-room", "not-elementwise", "computed-weight"],
)
def test_what_is_left_alone(function, room: bool) -> None:
    augmented(function, inputs(room), made=0)


def test_more_rank_than_room_is_left_alone() -> None:
    def wide(z, W, A, B):
        x = torch.tanh(z)
        h = torch.mm(x, permute(A, [1, 0]))
        return torch.mm(x, permute(W, [1, 0])) + torch.mm(h, permute(B, [1, 0]))

    for rank, made in ((ROOM, 1), (ROOM + 1, 0)):
        z, A, B = torch.randn(4, 80), torch.randn(rank, 80), torch.randn(N, rank)
        augmented(wide, [z, with_room(torch.randn(N, 80)), A, B], made)


def test_room_shows_by_strides() -> None:
    W = torch.randn(N, K)
    wide = with_room(W)
    assert torch.equal(wide, W)
    assert has_room(wide)
    assert not has_room(W)
    assert not has_room(wide.clone())
    assert torch.equal(room_of(wide), torch.zeros(N, ROOM))
    room_of(wide).fill_(1)
    assert torch.equal(wide, W)


def test_a_square_weight_that_is_not_transposed_is_left_alone() -> None:
    def other(z, W, A, B):
        x = torch.tanh(z)
        h = torch.mm(x, permute(A, [1, 0]))
        return torch.mm(x, permute(W, [0, 1])) + torch.mm(h, permute(B, [1, 0]))

    given = [torch.randn(4, K), with_room(torch.randn(K, K)), torch.randn(R, K), torch.randn(K, R)]
    augmented(other, given, made=0)


def test_what_reads_x_by_its_strides_leaves_it_alone() -> None:
    def strided(z, W, A, B):
        x = torch.tanh(z)
        h = torch.mm(x, permute(A, [1, 0]))
        y = torch.mm(x, permute(W, [1, 0])) + torch.mm(h, permute(B, [1, 0]))
        return y, x.as_strided((2, 2), (K, 1))

    given = [torch.randn(4, K), with_room(torch.randn(N, K)), torch.randn(R, K), torch.randn(N, R)]
    augmented(strided, given, made=0)


def test_strides_without_the_room_behind_them_are_no_harm() -> None:
    graph = augmented(with_a_bias, inputs())
    given = inputs()
    W = given[1]
    short = torch.zeros((N - 1) * (K + ROOM) + K, dtype=W.dtype).as_strided(W.shape, W.stride())
    given[1] = short.copy_(W)
    assert has_room(short)
    assert not owns_room(short)
    assert relative(graph(*given), with_a_bias(*inputs(room=False))) < 1e-14
