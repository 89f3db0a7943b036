"""Elementwise programs of a sum with a low-rank term."""

import pytest
import torch
from torch import Tensor

from lora_fx.kernels.elementwise import MAX_RANK, OPERATIONS, elementwise, parse
from tests.dense import relative

SILU_BACKWARD = (
    "v0 = sigmoid(x1); v1 = mul(x1, v0); v2 = mul(x0, v1); v3 = mul(x0, x2); v4 = mul(v3, v0); "
    "v5 = sub(1, v0); v6 = mul(x1, v5); v7 = add(v6, 1); v8 = mul(v4, v7); return v2, v8"
)
SHAPES = [(64, 512, 16), (1000, 1023, 5), (77, 4096, MAX_RANK), (3, 2, 1)]


def inputs(m: int, n: int, rank: int, dtype: torch.dtype, device: str = "cpu"):
    torch.manual_seed(0)
    wide = torch.randn(m, 3 * n + 5, device=device).to(dtype)
    P = torch.randn(m, 3 * rank, device=device).to(dtype)[:, rank : 2 * rank]
    Q = torch.randn(n, rank, device=device).to(dtype).t()
    return list(wide[:, : 3 * n].split(n, 1)), P, Q


def silu_backward(xs: list[Tensor], P: Tensor, Q: Tensor) -> list[Tensor]:
    gradient = xs[0] + P @ Q
    silu = torch.nn.functional.silu(xs[1])
    return [gradient * silu, torch.ops.aten.silu_backward(gradient * xs[2], xs[1])]


def check(m: int, n: int, rank: int, dtype: torch.dtype, device: str) -> None:
    xs, P, Q = inputs(m, n, rank, dtype, device)
    got = elementwise(xs, P, Q, SILU_BACKWARD)
    exact = silu_backward([x.double() for x in xs], P.double(), Q.double())
    plain = silu_backward(xs, P, Q)
    for one, want, rounded in zip(got, exact, plain, strict=True):
        assert one.dtype == dtype
        assert one.is_contiguous()
        assert relative(one, want) <= 1.01 * relative(rounded, want)
    other = elementwise(xs, P * 2, Q, SILU_BACKWARD)
    assert relative(other[0], exact[0]) > 1e-2
    again = elementwise(xs, P, Q, SILU_BACKWARD)
    assert all(map(torch.equal, got, again))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 14336, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype, "cuda")


def every_operation() -> str:
    two = ("add", "sub", "mul", "div")
    lines = [f"v0 = {two[0]}(x0, x1)"]
    for name in OPERATIONS:
        last = f"v{len(lines) - 1}"
        lines.append(f"v{len(lines)} = {name}({f'{last}, 3' if name in two else last})")
    return "; ".join([*lines, f"return v{len(lines) - 1}, v2"])


@pytest.mark.gpu
def test_kernel_of_every_operation() -> None:
    xs, P, Q = inputs(100, 300, 4, torch.bfloat16)
    want = elementwise([x.double() for x in xs], P.double(), Q.double(), every_operation())
    got = elementwise([x.cuda() for x in xs], P.cuda(), Q.cuda(), every_operation())
    for one, exact in zip(got, want, strict=True):
        assert relative(one.cpu(), exact) < 1e-2


def test_a_program_has_lines_and_results() -> None:
    lines, returned = parse("v0 = sub(1, x0); v1 = exp(v0); return v1, x0")
    assert [tuple(line) for line in lines] == [("v0", "sub", ["1", "x0"]), ("v1", "exp", ["v0"])]
    assert returned == ["v1", "x0"]


def test_fakes_have_the_same_shapes() -> None:
    xs, P, Q = inputs(70, 30, 4, torch.bfloat16)
    torch.library.opcheck(elementwise, (xs, P, Q, SILU_BACKWARD))
