"""Both gradients of a low-rank product, in partial sums."""

import pytest
import torch
from torch import Tensor

from lora_fx.kernels.expand_backward import (
    COLUMNS,
    MAX_RANK,
    expand_backward,
    rows_of_a_part,
)
from tests.dense import relative

SHAPES = [(8192, 1024, 8), (1000, 1023, 5), (77, 4096, MAX_RANK), (3, 2, 1)]


def inputs(m: int, n: int, rank: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    dy, B = torch.randn(m, n, device=device), torch.randn(n, rank, device=device)
    h = torch.randn(m, 3 * rank, device=device)[:, rank : 2 * rank]
    return dy.to(dtype), B.to(dtype), h.to(dtype)


def check(m: int, n: int, rank: int, dtype: torch.dtype, device: str) -> None:
    dy, B, h = inputs(m, n, rank, dtype, device)
    dh, dB = expand_backward(dy, B, h)
    assert dh.shape == (-(-n // COLUMNS), m, rank)
    assert dB.shape == (-(-m // rows_of_a_part(n)), n, rank)
    assert dh.dtype == dB.dtype == torch.float32
    exact = dy.double(), B.double(), h.double()
    assert relative(dh.sum(0), exact[0] @ exact[1]) < 1e-5
    assert relative(dB.sum(0), exact[0].T @ exact[2]) < 1e-5
    assert relative(dh.sum(0) * 1.01, exact[0] @ exact[1]) > 1e-3
    for one, other in zip((dh, dB), expand_backward(dy, B, h), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 14336, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype, "cuda")


def test_fakes_have_the_same_shapes() -> None:
    torch.library.opcheck(expand_backward, inputs(700, 300, 4, torch.bfloat16, "cpu"))


def test_a_part_has_a_tile_at_least() -> None:
    assert [rows_of_a_part(n) for n in (1, 1024, 4096, 14336, 28672)] == [
        256,
        256,
        1024,
        4096,
        8192,
    ]
