"""Dropout drawn in the kernels that multiply, here in their plain references."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule

import lora_fx
from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.graph.verify import verify
from lora_fx.kernels import dropped_products
from lora_fx.kernels.dropped_products import MAX_RANK, MOST_SITES, dropped_shrink
from lora_fx.passes.drop_in_kernel import drop_in_kernel
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module, run
from tests.dense import relative
from tests.marked import Block, add_adapter
from tests.tiny import llama, spec, tokens

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda device: device == "cpu")


def block(rank: int = 2, dropout: float = 0.25, compute: str = "activation") -> Block:
    torch.manual_seed(0)
    block = Block().to(HALF)
    for name in ("gate", "up", "down"):
        add_adapter(getattr(block, name), "default", rank, 0.7, dropout, compute)
    return block


def adapted(module: nn.Module, x: Tensor) -> GraphModule:
    graph = capture_module(module, x)
    apply([ExpandSites()], graph)
    return graph


def test_text() -> None:
    graph = adapted(block(), torch.randn(4, 6, 5, dtype=HALF))
    assert drop_in_kernel(graph) == 2
    verify(graph, "fused", "drop_in_kernel")
    lines = [line for line in text(graph).splitlines() if line.endswith("# drop_in_kernel")]
    assert_expected_inline(
        "\n".join(lines),
        """\
%randint: i64[2] = randint(-9223372036854775808, 9223372036854775807, (2), device=cpu)   # drop_in_kernel
%cat: f32[4, 5] = cat([@gate.lora_A.default.weight, @up.lora_A.default.weight])   # drop_in_kernel
%flatten: bf16[24, 5] = .flatten(%l_x_, 0, -2)   # drop_in_kernel
%dropped_shrink_default: bf16[24, 4] = lora_fx.dropped_shrink(%flatten, %cat, %randint, 0.25)   # drop_in_kernel
%size = .size(%l_x_, 0)   # drop_in_kernel
%size_1 = .size(%l_x_, 1)   # drop_in_kernel
%reshape: bf16[4, 6, 4] = .reshape(%dropped_shrink_default, (%size, %size_1, 4))   # drop_in_kernel
%split = split(%reshape, 2, -1)   # drop_in_kernel
%getitem: bf16[4, 6, 2] = getitem(%split, 0)   # drop_in_kernel
%getitem_1: bf16[4, 6, 2] = getitem(%split, 1)   # drop_in_kernel
%randint_1: i64[1] = randint(-9223372036854775808, 9223372036854775807, (1), device=cpu)   # drop_in_kernel
%flatten_1: bf16[24, 7] = .flatten(%mul, 0, -2)   # drop_in_kernel
%dropped_shrink_default_1: bf16[24, 2] = lora_fx.dropped_shrink(%flatten_1, @down.lora_A.default.weight, %randint_1, 0.25)   # drop_in_kernel
%size_2 = .size(%mul, 0)   # drop_in_kernel
%size_3 = .size(%mul, 1)   # drop_in_kernel
%reshape_1: bf16[4, 6, 2] = .reshape(%dropped_shrink_default_1, (%size_2, %size_3, 2))   # drop_in_kernel""",
    )


def test_what_is_left_alone() -> None:
    x = torch.randn(4, 5, dtype=HALF)
    assert drop_in_kernel(adapted(block(dropout=0.0), x)) == 0
    assert drop_in_kernel(adapted(block(rank=MAX_RANK + 1), x)) == 0
    assert drop_in_kernel(adapted(block(compute="float32"), x)) == 0
    assert drop_in_kernel(adapted(block().float(), x.float())) == 0
    assert drop_in_kernel(adapted(block(), x[0])) == 0
    graph = adapted(block(), x)
    assert drop_in_kernel(graph) == 2
    assert not any(node.target is ops.shrink for node in graph.graph.nodes)


def test_branches_of_other_ranks_draw_by_themselves() -> None:
    module = block()
    add_adapter(module.side, "default", 3, dropout=0.25)
    assert drop_in_kernel(adapted(module, torch.randn(4, 5, dtype=HALF))) == 3


class WithoutGradients(Block):
    """Its gate learns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x)
        return self.up(x) * gate


class OneAfterTheOther(Block):
    """The factor of `up` is made of its own after `gate` has computed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * self.gate(x)


def calls(graph: GraphModule) -> list[tuple[int, float]]:
    """Return the rows of A and the p of each call."""
    found = (node for node in graph.graph.nodes if node.target is dropped_shrink)
    return [(len(node.args[1].meta["example_value"]), node.args[3]) for node in found]


def test_what_branches_have_in_common() -> None:
    x = torch.randn(4, 5, dtype=HALF)
    other_p = block()
    add_adapter(other_p.side, "default", 2, dropout=0.5)
    graph = adapted(other_p, x)
    drop_in_kernel(graph)
    assert calls(graph) == [(4, 0.25), (2, 0.25), (2, 0.5)]
    apart = WithoutGradients().to(HALF)
    for name in ("gate", "up"):
        add_adapter(getattr(apart, name), "default", 2, dropout=0.25)
    graph = adapted(apart, x)
    drop_in_kernel(graph)
    assert calls(graph) == [(2, 0.25), (2, 0.25)]


def test_a_factor_that_is_made_later() -> None:
    module = OneAfterTheOther().to(HALF)
    for name in ("gate", "up"):
        add_adapter(getattr(module, name), "default", 2, dropout=0.25)
    graph = adapted(module, torch.randn(4, 5, dtype=HALF))
    first, last = (node for node in graph.graph.nodes if node.target is ops.shrink)
    with graph.graph.inserting_before(last):
        made = graph.graph.call_function(torch.neg, (last.args[1],))
        made.meta["example_value"] = last.args[1].meta["example_value"]
    last.args = (last.args[0], made, *last.args[2:])
    assert first.args[0] is last.args[0]
    assert drop_in_kernel(graph) == 2


def test_many_branches_take_several_calls() -> None:
    module = Block().to(HALF)
    for i in range(MOST_SITES + 1):
        add_adapter(module.side, f"a{i}", 2, dropout=0.25)
    graph = adapted(module, torch.randn(4, 5, dtype=HALF))
    drop_in_kernel(graph)
    assert calls(graph) == [(2 * MOST_SITES, 0.25), (2, 0.25)]


def test_means_are_those_without_dropout() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 3, 5, dtype=HALF).expand(20000, 3, 5)
    module = nn.Sequential(nn.Linear(5, 7)).to(HALF)
    add_adapter(module[0], "default", 2, dropout=0.25)
    graph = adapted(module, x)
    drop_in_kernel(graph)
    got = run(graph, module, x).float()
    assert relative(got.mean(0), module.eval()(x[:1])[0].float()) < 0.02
    assert (got.std(0) / got.mean(0).abs()).min() > 0.02


def slope_over_gradient(dropout: float, checkpoint: str, device: str = "cpu") -> float:
    """Return how a loss rises along its gradient, as a share of what the gradient says."""
    text = spec(adapter=f"rank = 4 alpha = 8 dropout = {dropout}")
    text = text.replace("unit", f"checkpoint = {checkpoint} unit")
    torch.manual_seed(0)
    model: Any = lora_fx.compile(llama(2).to(device, torch.float16), text).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids, step = tokens(5, 23).to(device), 0.005

    def loss() -> Tensor:
        torch.manual_seed(7)
        return model(input_ids=ids, use_cache=False).logits.double().square().mean()

    loss().backward()
    moved = {p: p.detach().clone() for p in model.parameters() if p.grad is not None}
    slope = sum(p.grad.double().square().sum() for p in moved).sqrt()
    losses = []
    for length in (step, -step):
        with torch.no_grad():
            for p, start in moved.items():
                p.copy_(start + length / slope * p.grad)
        losses.append(loss().item())
    return (losses[0] - losses[1]) / (2 * step * slope.item())


@pytest.mark.parametrize("checkpoint", ["none", "layers", "budget(0.2)"])
@pytest.mark.parametrize("dropout", [0.2, 0.5])
def test_the_backward_pass_draws_the_same(checkpoint: str, dropout: float) -> None:
    assert abs(slope_over_gradient(dropout, checkpoint) - 1) < 0.04


def test_other_draws_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dropped_factors", "dropped_expand"):
        function = getattr(dropped_products, name)
        other = lambda *given, function=function: function(*given[:2], given[2] + 1, given[3])  # noqa: E731
        monkeypatch.setattr(dropped_products, name, other)
    assert abs(slope_over_gradient(0.45, "none") - 1) > 0.2  # not compiled before, and cached


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", ["none", "layers", "budget(0.2)"])
def test_on_a_gpu(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert abs(slope_over_gradient(0.5, checkpoint, "cuda") - 1) < 0.04
