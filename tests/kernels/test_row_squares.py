"""The squares in the rows of W + s B A, beside the dense sums."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lora_fx.graph.row_norms import row_norms
from lora_fx.kernels import row_squares as kernel
from lora_fx.kernels.row_squares import MAX_RANK, columns_of_a_part, row_squares
from tests.dense import relative

SHAPES = [(600, 1030, 3), (70, 300, 16), (1, 2, 1), (130, 1100, MAX_RANK)]
DTYPES = [torch.bfloat16, torch.float16]


def inputs(out: int, columns: int, rank: int, turned: bool = False) -> tuple[Tensor, ...]:
    torch.manual_seed(out)
    W, A = torch.randn(out, columns), torch.randn(rank, columns)
    B, scaling = torch.randn(out, rank), torch.tensor([7.0, -0.6])[1]
    if turned:
        W, A, B = (one.t().contiguous().t() for one in (W, A, B))
    return W, A, B, scaling


def check(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> None:
    got = row_squares(W, A, B, scaling)
    part = columns_of_a_part(*W.shape)
    assert got.shape == (-(-W.shape[1] // part), len(W))
    assert got.dtype == torch.float32
    dense = W.double() + scaling.double() * B.double() @ A.to(W.dtype).double()
    want = torch.stack([one.square().sum(1) for one in dense.split(part, 1)])
    precise = 1e-5 if W.dtype == torch.bfloat16 else 1e-6
    assert relative(got, want) < precise
    assert relative(got, torch.stack([p.double().square().sum(1) for p in W.split(part, 1)])) > 0.1
    assert torch.equal(got, row_squares(W, A, B, scaling))
    assert relative(got.sum(0).sqrt(), row_norms(W, A, B, scaling)) < 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    W, *factors = inputs(*shape)
    check(W.to(dtype), *factors)


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 4096, 16), (4096, 14336, 16), (14336, 4096, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype, turned: bool) -> None:
    W, A, B, scaling = (one.cuda() for one in inputs(*shape, turned))
    check(W.to(dtype), A, B, scaling)
    check(W.to(dtype), A.to(dtype), B.to(dtype), scaling)


def test_fakes_have_the_same_shapes() -> None:
    W, *factors = inputs(700, 1300, 4)
    torch.library.opcheck(row_squares, (W.bfloat16(), *factors))


def test_all_columns_are_in_a_part() -> None:
    shapes = [(1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096), (1, 1)]
    assert [columns_of_a_part(*shape) for shape in shapes] == [512, 512, 2048, 2048, 512]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernel_under_the_interpreter() -> None:
    """In a process of its own, since Triton asks once."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=interpreted, check=True)


def _interpreted() -> None:
    from lora_fx.kernels.row_squares_triton import launch

    for shape in SHAPES:
        for turned in (False, True):
            W, *factors = inputs(*shape, turned)
            W = W.half()
            want = kernel.row_squares_reference(W, *factors)
            got = torch.full_like(want, float("nan"))
            launch(W, *factors, got, columns_of_a_part(*W.shape))
            assert relative(got, want) < 1e-6


if __name__ == "__main__":
    _interpreted()
