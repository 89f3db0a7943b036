"""Low-rank products with the factors that samples pick, beside one sample and term at a time."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.kernels.picked_products import GATES, picked_expand, picked_shrink
from tests.dense import relative

SHAPES = [(5, 1, 1100, 300, 1), (4, 1, 600, 257, 2), (5, 17, 1100, 300, 2), (3, 70, 600, 257, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return what both take, of two sites; x and y are views, with strides of their own."""
    S, T, n, out, terms = shape
    torch.manual_seed(S * T)
    which = torch.randint(-1, 5, (S, terms), device=device)
    which[0], which[1, 0] = -1, 4
    outs = out, out + 130
    return {
        "x": torch.randn(T, S, n, device=device).to(dtype).transpose(0, 1),
        "y": [torch.randn(S, m, T, device=device).to(dtype).transpose(1, 2) for m in outs],
        "A": [torch.randn(*s, n, device=device) / n**0.5 for s in 2 * ([4], [3], [3, 5])],
        "B": [torch.randn(*s, device=device) for m in outs for s in ([m, 4], [m, 3], [3, m, 5])],
        "which": which,
        "shares": torch.randn(terms, S, device=device).t(),
        "scalings": [torch.rand(5, device=device) + 0.5 for _ in outs],
    }


def of_one_width(of: dict[str, Any]) -> dict[str, Any]:
    """Return the same, but the second site as wide as the first."""
    out = of["y"][0].shape[2]
    B = [*of["B"][:3], *(one[..., :out, :].contiguous() for one in of["B"][3:])]
    return {**of, "y": [one[..., :out] for one in of["y"]], "B": B}


def both(of: dict[str, Any], dtype: torch.dtype, gate: str = "") -> tuple[Tensor, list[Tensor]]:
    h = picked_shrink(of["x"], of["A"], len(of["y"]), of["which"], 5, 512, dtype)
    return h, picked_expand(of["y"], h, *expanding(of), dtype, gate)


def expanding(of: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(of[name] for name in ("B", "which", "shares", "scalings"))


def dense(of: dict[str, Any], site: int, sample: int, shift: int = 0) -> Tensor:
    """Compute one sample in float64, of adapters that are `shift` places further on."""
    count = len(of["A"]) // len(of["y"])
    own = (of[name][site * count :][:count] for name in "AB")
    A, B = ([one for t in some for one in (t if t.dim() == 3 else [t])] for some in own)
    z = of["y"][site][sample].double()
    for t, place in enumerate(of["which"][sample].tolist()):
        if place >= 0:
            j = (place + shift) % 5
            factor = of["shares"][sample, t].double() * of["scalings"][site][j].double()
            z = z + factor * (of["x"][sample].double() @ A[j].double().T) @ B[j].double().T
    return z


def allowed(dtype: torch.dtype) -> float:
    return max(3e-6, 3 * torch.finfo(dtype).eps)


def check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    of = inputs(shape, dtype, device)
    h, z = both(of, dtype)
    S = shape[0]
    assert h.shape == (2, -(-shape[2] // 512), *shape[:2], 5 * shape[4])
    assert h.dtype == torch.float32
    for i, own in enumerate(z):
        assert own.dtype == dtype
        assert own.is_contiguous()
        assert torch.equal(own[0], of["y"][i][0])
        for sample in range(S):
            assert relative(own[sample], dense(of, i, sample)) < allowed(dtype)
        assert relative(own[1], dense(of, i, 1, shift=1)) > 0.1
    again = both(of, dtype)
    assert all(map(torch.equal, (h, *z), (again[0], *again[1])))
    of["A"][0].fill_(float("nan"))
    others = [s for s in range(S) if 0 not in of["which"][s].tolist()]
    assert all(
        torch.equal(a[others], b[others]) for a, b in zip(both(of, dtype)[1], z, strict=True)
    )


def check_gate(shape: tuple[int, ...], dtype: torch.dtype, device: str, gate: str) -> None:
    of = of_one_width(inputs(shape, dtype, device))
    (z,) = both(of, dtype, gate)[1]
    for sample in range(shape[0]):
        first, second = (dense(of, i, sample) for i in range(2))
        assert relative(z[sample], GATES[gate](first) * second) < allowed(dtype)
        assert relative(z[sample], GATES[gate](second) * first) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cpu")


@pytest.mark.parametrize("gate", GATES)
def test_reference_with_a_gate(gate: str) -> None:
    check_gate(SHAPES[2], torch.float32, "cpu", gate)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (64, 128, 4096, 1024, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_with_a_gate(gate: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_gate(shape, dtype, "cuda", gate)


@pytest.mark.parametrize("case", ["all in one tensor", "each in its own"])
def test_factors_of_one_kind(case: str) -> None:
    of = inputs(SHAPES[0], torch.float32)
    first, last = (2, 5) if case == "all in one tensor" else (0, 2)
    want = [dense(of, 1, s) for s in range(5)]
    kept = (of["which"] >= first) & (of["which"] < last)
    of["which"] = torch.where(kept, of["which"] - first, -1)
    single = slice(2, 3) if first else slice(0, 2)
    for name in "AB":
        of[name] = [*of[name][:3][single], *of[name][3:][single]]
    of["scalings"] = [one[first:] for one in of["scalings"]]
    z = both(of, torch.float32)[1][1]
    for s in range(5):
        if bool(kept[s].any()):
            assert relative(z[s], want[s]) < 1e-6
        else:
            assert torch.equal(z[s], of["y"][1][s])


def test_fakes_have_the_same_shapes() -> None:
    of = of_one_width(inputs(SHAPES[1], torch.float32))
    shrunk = of["x"], of["A"], 2, of["which"], 5, 512, torch.float32
    torch.library.opcheck(picked_shrink, shrunk, test_utils="test_faketensor")
    for gate in ("", "silu"):
        expanded = of["y"], picked_shrink(*shrunk), *expanding(of), torch.float32, gate
        torch.library.opcheck(picked_expand, expanded, test_utils="test_faketensor")


def test_gradients_are_refused() -> None:
    of = inputs(SHAPES[1], torch.float32)
    of["x"] = of["x"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="without gradients"):
        both(of, torch.float32)[1][0].sum().backward()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    """In float32 and float16; in a process of its own, since Triton asks once."""
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=interpreted, check=True)


def _interpreted() -> None:
    for shape in SHAPES:
        for dtype in DTYPES[:2]:
            of = inputs(shape, dtype)
            _compare(of, dtype, "")
            for gate in ("silu", "gelu"):  # the interpreter has no tanh
                _compare(of_one_width(of), dtype, gate)


def _compare(of: dict[str, Any], dtype: torch.dtype, gate: str) -> None:
    from lora_fx.kernels.picked_products_triton import expand, shrink

    h, z = both(of, dtype, gate)
    own_h = torch.full_like(h, float("nan"))
    shrink(of["x"], of["A"], of["which"], own_h, 5, 512, dtype)
    assert relative(own_h, h) < 2e-6
    own_z = [torch.full_like(one, float("nan")) for one in z]
    expand(of["y"], h, *expanding(of), own_z, dtype, gate)
    for one, other in zip(own_z, z, strict=True):
        assert relative(one, other) < max(2e-6, torch.finfo(dtype).eps)


if __name__ == "__main__":
    _interpreted()
