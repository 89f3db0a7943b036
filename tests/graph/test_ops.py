import pytest
import torch
from torch.library import opcheck

from lora_fx.graph import ops
from tests.dense import adapted_linear, relative

KEY = "linear[r2:p0.0:activation|r3:p0.0:activation]"


def inputs(dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(0)
    return {
        "x": torch.randn(4, 5, dtype=dtype, requires_grad=True),
        "W": torch.randn(7, 5, dtype=dtype),
        "params": [
            torch.randn(*shape, requires_grad=True) for shape in [(2, 5), (7, 2), (3, 5), (7, 3)]
        ],
        "scalings": torch.tensor([0.5, -1.25]),
    }


def call(v: dict, key: str = KEY) -> torch.Tensor:
    y = torch.nn.functional.linear(v["x"], v["W"])
    return ops.site(y, v["x"], v["params"], v["scalings"], key, [])


def dense(v: dict) -> torch.Tensor:
    A0, B0, A1, B1 = v["params"]
    return adapted_linear(v["x"], v["W"], None, [(0.5, A0, B0), (-1.25, A1, B1)])


def test_site_is_the_dense_sum() -> None:
    v = inputs()
    assert relative(call(v), dense(v)) < 1e-6
    base = torch.nn.functional.linear(v["x"], v["W"])
    assert relative(base, dense(v)) > 0.1


def test_gradients_are_those_of_the_dense_sum() -> None:
    v, w = inputs(), inputs()
    leaves = lambda t: [t["x"], *t["params"]]  # noqa: E731
    got = torch.autograd.grad(call(v).square().sum(), leaves(v))
    want = torch.autograd.grad(dense(w).square().sum(), leaves(w))
    for a, b in zip(got, want, strict=True):
        assert b.norm() > 0.1
        assert relative(a, b) < 1e-5


def test_the_arithmetic_is_in_the_activation_dtype() -> None:
    v = inputs(torch.bfloat16)
    assert call(v).dtype is torch.bfloat16
    assert relative(call(v), dense(v)) < 2e-2


def test_compute_dtype_holds_under_autocast() -> None:
    v = inputs()
    h = lambda compute: ops.shrink(v["x"], v["params"][0], 0.0, compute)  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert h("activation").dtype is torch.bfloat16
        assert h("float32").dtype is torch.float32
        exact = h("float32")
    assert torch.equal(exact, v["x"] @ v["params"][0].T)


def test_dropout_drops_and_rescales() -> None:
    x, A = torch.ones(100, 50), torch.eye(50)
    h = ops.shrink(x, A, 0.3, "activation")
    kept = h[h != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / 0.7))
    assert 0.25 < (h == 0).float().mean() < 0.35


@pytest.mark.parametrize("key", [KEY, KEY.replace("activation", "float64")])
def test_the_schema_holds(key: str) -> None:
    v = inputs()
    y = torch.nn.functional.linear(v["x"], v["W"])
    args = (y, v["x"], v["params"], v["scalings"], key, [])
    opcheck(ops.site, args, test_utils=("test_schema", "test_faketensor"))
