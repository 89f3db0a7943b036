"""Sites that are joined compute what they computed, whatever stands between them."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx import kernels
from tests.dense import relative

TWO = """lora 1
adapter a { rank = 4 init = random trainable = false target q, k }
adapter b { rank = 3 init = random trainable = false target q, k }
route { }
"""
ACROSS = """lora 1
adapter p { rank = 4 init = random target q, v }
adapter p2 { rank = 4 init = random target q, v }
adapter r { rank = 4 dtype = bfloat16 compute = float32 init = random target q, k }
adapter r2 { rank = 4 dtype = bfloat16 compute = float32 init = random target q, k }
route { }
"""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda *_: True)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(8))


class InputWritten(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        q = self.q(x)
        x.mul_(2)
        return q - self.k(x)


class ViewOfInputWritten(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        row, q = x.view(-1, 8), self.q(x)
        row += 1
        return q + self.k(x)


class CacheWritten(Layers):
    def forward(self, x: Tensor) -> Tensor:
        cache = self.weight.clone()
        read = self.q(x) * cache
        cache.zero_()
        return read + self.k(x) + cache


class ResultWritten(Layers):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        F.relu(q, inplace=True)
        return q + self.k(x)


class ViewOfResultWritten(Layers):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        half = q[..., :4]
        half = operator.itruediv(half, 8)
        return q + self.k(x) + half.sum()


class ReadForNothing(Layers):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        _ = q.abs()
        return q + self.k(x)


class WithoutGradients(Layers):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        scaled = q * self.weight
        with torch.no_grad():
            k = self.k(x)
        return scaled + k


class Three(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * 2 + self.v(x) * 3


class OneAfterAnother(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.k(x + 0 * self.q(x))


def both(made: type[nn.Module], spec: str, names: list[str]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    base, x = made(), torch.randn(3, 5, 8)
    got, want = (
        lora_fx.compile(base, spec, backend=backend).eval()(x, adapter_names=names)
        for backend in ("eager", None)
    )
    return got, want


def joined(made: type[nn.Module], spec: str, names: list[str]) -> int:
    """How many kernels there are for as many sites."""
    model: Any = lora_fx.compile(made(), spec, backend="eager").eval()
    text = lora_fx.capture(model, x=torch.randn(3, 5, 8), adapter_names=names).text("fused")
    return text.count("lora_fx.picked_expand(")


@pytest.mark.parametrize(
    ("made", "kernels"),
    [
        (InputWritten, 2),
        (ViewOfInputWritten, 2),
        (CacheWritten, 2),
        (ResultWritten, 2),
        (ViewOfResultWritten, 2),
        (ReadForNothing, 1),
        (WithoutGradients, 2),
        (OneAfterAnother, 2),
    ],
)
def test_what_stands_between_two_sites(made: type[nn.Module], kernels: int) -> None:
    names = ["a", "__base__", "b"]
    got, want = both(made, TWO, names)
    assert relative(got, want) < 1e-6
    assert got.requires_grad == want.requires_grad
    assert relative(both(made, TWO, ["b", "a", "__base__"])[0], want) > 1e-2
    assert joined(made, TWO, names) == kernels


def test_groups_that_cross() -> None:
    names = ["p", "r", "r2"]
    with torch.no_grad():
        got, want = both(Three, ACROSS, names)
        assert relative(got, want) < 1e-6
        assert joined(Three, ACROSS, names) == 2, "of four"


def test_autocast_stays_off_where_it_is_off() -> None:
    """Of DoRA's norms, in any graph."""
    spec = "lora 1 adapter a { rank = 4 init = random variant = dora target q, k }"
    model: Any = lora_fx.compile(Three(), spec, backend="eager").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = lora_fx.capture(model, x=torch.randn(3, 5, 8)).text("fused")
    assert text.count("enter_autocast") > 0
    assert text.count("enter_autocast(") == text.count("exit_autocast(")
