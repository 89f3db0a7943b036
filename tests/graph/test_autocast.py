"""Autocast nodes: what is relied on of `torch.amp._enter_autocast` and `_exit_autocast`."""

import torch
from torch.fx import Graph, GraphModule

from lora_fx.graph.autocast import AUTOCAST_TARGETS, without_autocast
from tests.captured import capture_module


def build(autocast: bool) -> GraphModule:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with without_autocast(graph, "cpu"):
            inside = graph.call_function(torch.mm, (x, w))
        outside = graph.call_function(torch.mm, (x, w))
    graph.output((inside, outside))
    return GraphModule({}, graph)


def test_inside_is_exact_and_outside_is_not() -> None:
    module = build(autocast=True)
    x, w = torch.randn(3, 5), torch.randn(5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, outside = module(x, w)
        assert torch.is_autocast_enabled("cpu")
    assert inside.dtype is torch.float32
    assert outside.dtype is torch.bfloat16
    assert torch.equal(inside, x @ w)


def test_nothing_is_added_where_autocast_is_off() -> None:
    assert not any(node.target in AUTOCAST_TARGETS for node in build(autocast=False).graph.nodes)


def test_dynamo_writes_the_same_pair() -> None:
    class Inside(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x.T

    graph = capture_module(Inside(), torch.randn(3, 5)).graph
    assert [n.target for n in graph.nodes if n.target in AUTOCAST_TARGETS] == list(AUTOCAST_TARGETS)
