"""Low-rank products with the factors that samples pick, beside one sample and term at a time."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.kernels.picked_products import (
    expand_reference,
    picked_expand,
    picked_shrink,
    shrink_reference,
)
from tests.dense import relative

RANKS = [4, 3]  # of adapters with tensors of their own, before three of rank 5 in one
SHAPES = [(5, 1, 1100, 300, 1), (4, 1, 600, 257, 2), (5, 17, 1100, 300, 2), (3, 70, 600, 257, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return what both take; x and y are views, with strides of their own."""
    S, T, n, out, terms = shape
    torch.manual_seed(S * T)
    which = torch.randint(-1, 5, (S, terms), device=device)
    which[0], which[1, 0] = -1, 4
    return {
        "x": torch.randn(T, S, n, device=device).to(dtype).transpose(0, 1),
        "y": torch.randn(S, out, T, device=device).to(dtype).transpose(1, 2),
        "A": [torch.randn(*s, n, device=device) for s in ([4], [3], [3, 5])],
        "B": [torch.randn(*s, device=device) for s in ([out, 4], [out, 3], [3, out, 5])],
        "which": which,
        "shares": torch.randn(terms, S, device=device).t(),
        "scalings": torch.rand(5, device=device) + 0.5,
    }


def both(of: dict[str, Any], dtype: torch.dtype, part: int = 512) -> tuple[Tensor, Tensor]:
    h = picked_shrink(of["x"], of["A"], of["which"], 5, part, dtype)
    more = (of[name] for name in ("B", "which", "shares", "scalings"))
    return h, picked_expand(of["y"], h, *more, dtype)


def dense(of: dict[str, Any], sample: int, shift: int = 0) -> Tensor:
    """Compute one sample in float64, of adapters that are `shift` places further on."""
    A, B = ([one for t in of[n] for one in (t if t.dim() == 3 else [t])] for n in "AB")
    z = of["y"][sample].double()
    for t, place in enumerate(of["which"][sample].tolist()):
        if place >= 0:
            j = (place + shift) % 5
            factor = of["shares"][sample, t].double() * of["scalings"][j].double()
            z = z + factor * (of["x"][sample].double() @ A[j].double().T) @ B[j].double().T
    return z


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    of = inputs(shape, dtype, device)
    h, z = both(of, dtype)
    assert h.shape == (-(-shape[2] // 512), *shape[:2], 5 * shape[4])
    assert h.dtype == torch.float32
    assert z.dtype == dtype
    assert z.is_contiguous()
    assert torch.equal(z[0], of["y"][0])
    allowed = max(2e-6, 3 * torch.finfo(dtype).eps)
    for sample in range(shape[0]):
        assert relative(z[sample], dense(of, sample)) < allowed
    assert relative(z[1], dense(of, 1, shift=1)) > 0.1
    again = both(of, dtype)
    assert torch.equal(again[0], h)
    assert torch.equal(again[1], z)
    of["A"][0].fill_(float("nan"))
    others = [s for s in range(shape[0]) if 0 not in of["which"][s].tolist()]
    assert torch.equal(both(of, dtype)[1][others], z[others])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (64, 128, 4096, 1024, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")


@pytest.mark.parametrize("case", ["all in one tensor", "each in its own"])
def test_factors_of_one_kind(case: str) -> None:
    of = inputs(SHAPES[0], torch.float32)
    kept = slice(2, 3) if case == "all in one tensor" else slice(0, 2)
    want = [dense(of, s) for s in range(5)]
    most = of["which"] >= 2 if kept.start else (of["which"] >= 0) & (of["which"] < 2)
    of["which"] = torch.where(most, of["which"] - kept.start, -1)
    of["A"], of["B"] = of["A"][kept], of["B"][kept]
    of["scalings"] = of["scalings"][kept.start :]
    z = both(of, torch.float32)[1]
    for s in range(5):
        if bool(most[s].any()):
            assert relative(z[s], want[s]) < 1e-6
        else:
            assert torch.equal(z[s], of["y"][s])


def test_fakes_have_the_same_shapes() -> None:
    of = inputs(SHAPES[1], torch.float32)
    shrunk = of["x"], of["A"], of["which"], 5, 512, torch.float32
    torch.library.opcheck(picked_shrink, shrunk, test_utils="test_faketensor")
    more = (of[name] for name in ("B", "which", "shares", "scalings"))
    expanded = of["y"], picked_shrink(*shrunk), *more, torch.float32
    torch.library.opcheck(picked_expand, expanded, test_utils="test_faketensor")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    """In float32 and float16; in a process of its own, since Triton asks once."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=interpreted, check=True)


def _interpreted() -> None:
    from lora_fx.kernels.picked_products_triton import expand, shrink

    for shape in SHAPES:
        for dtype in DTYPES[:2]:
            of = inputs(shape, dtype)
            h = shrink_reference(of["x"], of["A"], of["which"], 5, 512, dtype)
            own_h = torch.full_like(h, float("nan"))
            shrink(of["x"], of["A"], of["which"], own_h, 5, 512, dtype)
            assert relative(own_h, h) < 2e-6
            more = [of[name] for name in ("B", "which", "shares", "scalings")]
            z = expand_reference(of["y"], h, *more, dtype)
            own_z = torch.full_like(z, float("nan"))
            expand(of["y"], h, *more, own_z, dtype)
            assert relative(own_z, z) < max(2e-6, torch.finfo(dtype).eps)
            assert torch.equal(own_z[0], of["y"][0])


if __name__ == "__main__":
    _interpreted()
