import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule

from lora_fx.graph.text import text
from lora_fx.passes.causal_attention import attention_calls, causal_attention
from tests.captured import capture_module, run
from tests.dense import relative


class Attention(nn.Module):
    """Attention of 2 heads of width 3 with the mask that a function of (queries, keys) makes."""

    def __init__(self, mask, lengths: tuple[int, int] = (5, 5)) -> None:
        super().__init__()
        self.mask, self.lengths = mask, lengths
        self.q, self.kv = nn.Linear(7, 6), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.lengths
        q, k = (
            f(x[:, :n]).view(-1, n, 2, 3).transpose(1, 2)
            for f, n in ((self.q, queries), (self.kv, keys))
        )
        mask = self.mask(torch.arange(queries)[:, None], torch.arange(keys)[None], x)
        return F.scaled_dot_product_attention(q, k, k.exp(), mask[None, None])


def captured(mask, lengths: tuple[int, int] = (5, 5)) -> tuple[Attention, GraphModule, Tensor]:
    torch.manual_seed(0)
    module, x = Attention(mask, lengths), torch.randn(2, 11, 7)
    return module, capture_module(module, x), x


def how(graph: GraphModule) -> list[tuple[bool, bool]]:
    """Of each call of attention, whether it has a mask, and whether it is causal."""
    calls = [arguments for _, arguments in attention_calls(graph)]
    return [(a.get("attn_mask") is not None, a.get("is_causal", False)) for a in calls]


def causal(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return k <= q


def test_text() -> None:
    _, graph, _ = captured(causal)
    assert causal_attention(graph) == 1
    assert_expected_inline(
        text(graph),
        """\
%l_x_: f32[2, 11, 7] = input
%getitem: f32[2, 5, 7] = getitem(%l_x_, (slice(None, None, None), slice(None, 5, None)))
%linear: f32[2, 5, 6] = linear(%getitem, @q.weight, @q.bias)
%view: f32[2, 5, 2, 3] = .view(%linear, -1, 5, 2, 3)
%q: f32[2, 2, 5, 3] = .transpose(%view, 1, 2)
%getitem_1: f32[2, 5, 7] = getitem(%l_x_, (slice(None, None, None), slice(None, 5, None)))
%linear_1: f32[2, 5, 6] = linear(%getitem_1, @kv.weight, @kv.bias)
%view_1: f32[2, 5, 2, 3] = .view(%linear_1, -1, 5, 2, 3)
%k: f32[2, 2, 5, 3] = .transpose(%view_1, 1, 2)
%exp: f32[2, 2, 5, 3] = .exp(%k)
%scaled_dot_product_attention: f32[2, 2, 5, 3] = scaled_dot_product_attention(%q, %k, %exp, attn_mask=None, is_causal=True)   # causal_attention
return (%scaled_dot_product_attention)""",
    )


SAME = {
    "causal": (causal, (5, 5), (False, True)),
    "a window as long": (lambda q, k, x: (k <= q) & (k > q - 5), (5, 5), (False, True)),
    "everything": (lambda q, k, x: k <= q + 4, (5, 5), (False, False)),
    "the last query": (lambda q, k, x: k <= q + 6, (1, 7), (False, False)),
    "causal and ones": (
        lambda q, k, x: (k <= q) & torch.ones_like(k, dtype=torch.bool),
        (5, 5),
        (False, True),
    ),
}
OTHER = {
    "a shorter window": (lambda q, k, x: (k <= q) & (k > q - 4), (5, 5)),
    "the last two queries": (lambda q, k, x: k <= q + 5, (2, 7)),
    "strictly before": (lambda q, k, x: (k < q) | (k == 0), (5, 5)),
    "after": (lambda q, k, x: k >= q, (5, 5)),
    "one more": (lambda q, k, x: k <= q + 1, (5, 5)),
}
UNREAD = {
    "more keys": (causal, (5, 7)),
    "fewer keys": (causal, (7, 5)),
    "every other": (lambda q, k, x: 2 * k <= 2 * q, (5, 5)),
    "data": (lambda q, k, x: (k <= q) & (x[0, :5, 0] > -9), (5, 5)),
    "additive": (lambda q, k, x: torch.where(k <= q, 0.0, -torch.inf), (5, 5)),
}
CASES = SAME | OTHER | UNREAD


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_stay(name: str) -> None:
    mask, lengths, *want = CASES[name]
    module, graph, x = captured(mask, lengths)
    assert causal_attention(graph) == len(want)
    assert how(graph) == (want or [(True, False)])
    expected, got = module(x), run(graph, module, x)
    assert relative(got, expected) < 1e-6
    leaves = list(module.parameters())
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, expected)), strict=True):
        assert (a - b).norm() < 1e-5 * (1 + b.norm())


@pytest.mark.parametrize("name", OTHER)
def test_the_masks_that_are_kept_matter(name: str) -> None:
    """Negative control: neither `is_causal` nor no mask would have given the same."""
    mask, lengths = OTHER[name]
    module, _, x = captured(mask, lengths)
    expected = module(x)
    for other in (causal, lambda q, k, x: k > -1):
        module.mask = other
        assert relative(module(x), expected) > 1e-2


def test_one_call_may_keep_its_mask() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.window = Attention(causal), Attention(OTHER["a shorter window"][0])

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(x) + self.window(x)

    torch.manual_seed(0)
    module, x = Two(), torch.randn(2, 11, 7)
    graph = capture_module(module, x)
    assert causal_attention(graph) == 1
    assert how(graph) == [(False, True), (True, False)]
    assert relative(run(graph, module, x), module(x)) < 1e-6
