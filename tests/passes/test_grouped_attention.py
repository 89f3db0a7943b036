import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from lora_fx.graph.text import text
from lora_fx.passes.grouped_attention import grouped_attention
from tests.captured import capture_module, run
from tests.dense import relative


def repeated(x: Tensor, times: int) -> Tensor:
    """Each of (samples, heads, tokens, width)'s heads, `times` in a row."""
    samples, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(samples, heads, times, length, width)
    return x.reshape(samples, heads * times, length, width)


def tiled(x: Tensor, times: int) -> Tensor:
    """All heads, `times` over: another order."""
    samples, heads, length, width = x.shape
    x = x[:, None].expand(samples, times, heads, length, width)
    return x.reshape(samples, heads * times, length, width)


class Grouped(nn.Module):
    """6 query heads and 2 key and value heads of width 4."""

    def __init__(self, keys=repeated, values=repeated, masked: bool = False, kept: bool = False):
        super().__init__()
        self.keys, self.values, self.masked, self.kept = keys, values, masked, kept
        self.q, self.k, self.v = nn.Linear(7, 24), nn.Linear(7, 8), nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(3, 5, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = torch.ones(5, 5, dtype=torch.bool).tril() if self.masked else None
        k, v = self.keys(k, 3), self.values(v, 3)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not self.masked)
        return y + k if self.kept else y


def build(**settings) -> tuple[Grouped, Tensor]:
    torch.manual_seed(0)
    return Grouped(**settings), torch.randn(3, 5, 7)


def test_text() -> None:
    graph = capture_module(*build())
    assert grouped_attention(graph) == 1
    assert_expected_inline(
        text(graph),
        """\
%l_x_: f32[3, 5, 7] = input
%linear: f32[3, 5, 24] = linear(%l_x_, @q.weight, @q.bias)
%view: f32[3, 5, 6, 4] = .view(%linear, 3, 5, -1, 4)
%q: f32[3, 6, 5, 4] = .transpose(%view, 1, 2)
%linear_1: f32[3, 5, 8] = linear(%l_x_, @k.weight, @k.bias)
%view_1: f32[3, 5, 2, 4] = .view(%linear_1, 3, 5, -1, 4)
%k: f32[3, 2, 5, 4] = .transpose(%view_1, 1, 2)
%linear_2: f32[3, 5, 8] = linear(%l_x_, @v.weight, @v.bias)
%view_2: f32[3, 5, 2, 4] = .view(%linear_2, 3, 5, -1, 4)
%v: f32[3, 2, 5, 4] = .transpose(%view_2, 1, 2)
%y: f32[3, 6, 5, 4] = scaled_dot_product_attention(%q, %k, %v, attn_mask=None, is_causal=True, enable_gqa=True)   # grouped_attention
return (%y)""",
    )


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 1),
        ({"kept": True}, 1),
        ({"masked": True}, 0),
        ({"keys": tiled}, 0),
        ({"values": tiled}, 0),
    ],
    ids=["plain", "kept", "masked", "tiled-keys", "tiled-values"],
)
def test_outputs_and_gradients_stay(settings: dict, count: int) -> None:
    module, x = build(**settings)
    graph = capture_module(module, x)
    assert grouped_attention(graph) == count
    want, got = module(x), run(graph, module, x)
    assert relative(got, want) < 1e-6
    leaves = list(module.parameters())
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True
    ):
        assert (a - b).norm() < 1e-5 * (1 + b.norm())


def test_the_order_of_heads_matters() -> None:
    """Negative control: a graph of other heads, had they been taken for these, would differ."""
    module, x = build()
    want = module(x)
    for part in ("keys", "values"):
        other, _ = build(**{part: tiled})
        assert relative(other(x), want) > 1e-2
