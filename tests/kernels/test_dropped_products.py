"""Low-rank products of inputs that are dropped by a seed, beside dense sums of masked inputs."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from lora_fx.kernels import dropped_products as kernel
from lora_fx.kernels.dropped_products import (
    MAX_RANK,
    dropped_expand,
    dropped_factors,
    dropped_shrink,
)
from lora_fx.kernels.kept import kept, stretch
from tests.dense import relative

SHAPES = [(300, 1030, 3, 2), (70, 304, 16, 1), (1, 2, 1, 1), (130, 200, MAX_RANK, 5)]
DTYPES = [torch.bfloat16, torch.float16]
P = 0.3


def inputs(m: int, n: int, rank: int, sites: int) -> tuple[Tensor, ...]:
    torch.manual_seed(m)
    x, A = torch.randn(m, n + 4)[:, :n], torch.randn(sites * rank, n)
    dh, seeds = torch.randn(m, sites * rank), torch.randint(-(1 << 63), (1 << 63) - 1, (sites,))
    return x, A, dh, seeds


def dense(x: Tensor, A: Tensor, dh: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    masks = [kept(seed.cpu(), *x.shape, P).to(x.device) * stretch(P) for seed in seeds]
    factors, hs = A.to(x.dtype).double().chunk(len(seeds)), dh.double().chunk(len(seeds), 1)
    x = x.double()
    return (
        torch.cat([(x * mask) @ a.t() for mask, a in zip(masks, factors, strict=True)], 1),
        torch.cat([h.t() @ (x * mask) for mask, h in zip(masks, hs, strict=True)]),
        sum(h @ a * mask for h, a, mask in zip(hs, factors, masks, strict=True)),  # type: ignore[return-value]
    )


def check(x: Tensor, A: Tensor, dh: Tensor, seeds: Tensor) -> None:
    h, dA, dx = dense(x, A, dh, seeds)
    rounded = torch.finfo(x.dtype).eps
    for function, given, want, precise in (
        (dropped_shrink, (x, A), h, rounded),
        (dropped_factors, (dh, x), dA, 1e-5),
        (dropped_expand, (dh, A), dx, rounded),
    ):
        got = function(*given, seeds, P)
        assert got.dtype == (torch.float32 if function is dropped_factors else x.dtype)
        assert relative(got, want) < precise
        assert torch.equal(got, function(*given, seeds, P))
        if x.numel() > 2:
            assert relative(function(*given, seeds + 1, P), want) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, A, dh, seeds = inputs(*shape)
    check(x.to(dtype), A, dh.to(dtype), seeds)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 4096, 16, 3), (2048, 14336, 8, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, A, dh, seeds = (one.cuda() for one in inputs(*shape))
    check(x.to(dtype), A, dh.to(dtype), seeds)


def test_gradients() -> None:
    x, A, dh, seeds = inputs(*SHAPES[0])
    x, A = x.clone().requires_grad_(), A.requires_grad_()
    dropped_shrink(x, A, seeds, P).backward(dh)
    _, dA, dx = dense(x.detach(), A.detach(), dh, seeds)
    assert relative(A.grad, dA) < 1e-6
    assert relative(x.grad, dx) < 1e-6


def test_gradients_of_gradients() -> None:
    """Each is one side of Σ dh · drop(x) Aᵀ, whose derivatives are dense."""
    x, A, dh, seeds = (one.requires_grad_(one.is_floating_point()) for one in inputs(9, 20, 3, 2))
    mask = torch.stack([kept(seed, *x.shape, P) for seed in seeds]) * stretch(P)

    def gradients(h: Tensor) -> list[Tensor]:
        first = torch.autograd.grad((h * dh).sum(), (x, A), create_graph=True)
        total = sum(one.square().sum() for one in first)
        return list(torch.autograd.grad(total, (x, A, dh)))  # type: ignore[arg-type]

    parts = zip(mask, A.chunk(2), strict=True)
    want = gradients(torch.cat([(x * one) @ a.t() for one, a in parts], 1))
    got = gradients(dropped_shrink(x, A, seeds, P))
    for one, other in zip(got, want, strict=True):
        assert other.norm() > 1
        assert relative(one, other) < 1e-5


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, A, dh, seeds = inputs(*SHAPES[1])
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "dropped_expand", None)
        dropped_shrink(x, A.requires_grad_(), seeds, P).backward(dh)
    monkeypatch.setattr(kernel, "dropped_factors", None)
    dropped_shrink(x.requires_grad_(), A.detach(), seeds, P).backward(dh)
    assert A.grad is not None and x.grad is not None  # noqa: PT018


def test_what_is_dropped_may_be_infinite() -> None:
    x, A, _, seeds = inputs(4, 50, 3, 1)
    x = torch.where(kept(seeds[0], *x.shape, P), x, torch.inf)
    assert dropped_shrink(x, A, seeds, P).isfinite().all()
    assert not dropped_shrink(x, A, seeds + 1, P).isfinite().any()


def test_fakes_and_gradients_as_torch_checks_them() -> None:
    x, A, dh, seeds = inputs(20, 30, 4, 2)
    torch.library.opcheck(dropped_shrink, (x.requires_grad_(), A.requires_grad_(), seeds, P))
    torch.library.opcheck(dropped_factors, (dh, x.detach(), seeds, P))
    torch.library.opcheck(dropped_expand, (dh, A.detach(), seeds, P))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    """In a process of its own, since Triton asks once."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=interpreted, check=True)


def _interpreted() -> None:
    from lora_fx.kernels import dropped_products_triton as compiled

    for shape in [*SHAPES, (0, 40, 3, 2)]:
        x, A, dh, seeds = inputs(*shape)
        x, dh = x.half(), dh.half()
        if shape == SHAPES[1]:
            x = x.t().contiguous().t()
        for function, reference, given in (
            (compiled.shrink, kernel.shrink_reference, (x, A)),
            (compiled.factors, kernel.factors_reference, (dh, x)),
            (compiled.expand, kernel.expand_reference, (dh, A)),
        ):
            want = reference(*given, seeds, P)
            apart = torch.stack([seeds, seeds + 1], 1)[:, 0]  # not side by side
            got = function(*given, apart, P)
            assert got.shape == want.shape
            assert got.numel() == 0 or relative(got, want) < 1e-3 or not want.any()


if __name__ == "__main__":
    _interpreted()
