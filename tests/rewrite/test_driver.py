from collections.abc import Callable

import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import Graph, Node
from torch.utils.checkpoint import checkpoint

from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.rewrite.driver import apply, misses
from lora_fx.rewrite.metadata import call
from lora_fx.rewrite.rule import Match, Miss
from tests.captured import capture_module


class Replace:
    """tanh(x) → -build(x), a rule that uses the matched node's own value too."""

    name = "replace"

    def __init__(self, build: Callable[[Graph, Node], Node]) -> None:
        self._build = build

    def match(self, node: Node) -> Match | Miss:
        return Match(node) if node.target is torch.tanh else Miss("no tanh")

    def rewrite(self, graph: Graph, match: Match) -> Node:
        return self._build(graph, match.node)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.tanh(x) + 1)


negated_sine = Replace(lambda g, n: call(g, torch.neg, call(g, torch.sin, n.args[0])))


def test_every_match_is_replaced_and_noted() -> None:
    graph = capture_module(Twice(), torch.randn(3, 5))
    assert apply([negated_sine], graph) == {"replace": 2}
    assert_expected_inline(
        text(graph),
        """\
%l_x_: f32[3, 5] = input
%sin: f32[3, 5] = sin(%l_x_)   # replace
%neg: f32[3, 5] = neg(%sin)   # replace
%add: f32[3, 5] = add(%neg, 1)
%sin_1: f32[3, 5] = sin(%add)   # replace
%neg_1: f32[3, 5] = neg(%sin_1)   # replace
return (%neg_1)""",
    )
    x = torch.randn(3, 5)
    assert torch.equal(graph(x)[0], -torch.sin(-torch.sin(x) + 1))


def test_places_in_the_source_are_inherited() -> None:
    graph = capture_module(Twice(), torch.randn(3, 5))
    apply([negated_sine], graph)
    made = [n for n in graph.graph.nodes if "lora_fx" in n.meta]
    assert len(made) == 4
    assert all("torch.tanh" in n.meta["stack_trace"] for n in made)
    assert all(n.meta["example_value"].shape == (3, 5) for n in made)


def test_bodies_of_checkpoints_are_rewritten() -> None:
    class Checkpointed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(Twice(), x, use_reentrant=False)

    graph = capture_module(Checkpointed(), torch.randn(3, 5, requires_grad=True))
    assert apply([negated_sine], graph) == {"replace": 2}
    assert "tanh" not in text(graph)


def test_misses_say_why_and_change_nothing() -> None:
    graph = capture_module(Twice(), torch.randn(3, 5))
    before = text(graph)
    reasons = [(node.name, reason) for node, _, reason in misses([negated_sine], graph)]
    assert ("add", "no tanh") in reasons
    assert not any(name.startswith("tanh") for name, _ in reasons)
    assert text(graph) == before


def test_example_values_of_symbolic_sizes() -> None:
    """What is relied on of the Python dispatcher: a composite operator on symbolic sizes."""

    class Linear(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x) @ w.T

    torch._dynamo.mark_dynamic(x := torch.randn(3, 17, 5), 0)
    with torch.no_grad():
        graph = capture_module(Linear(), x, torch.randn(7, 5))
        x, w = (
            n
            for n in graph.graph.nodes
            if n.op == "placeholder"
            and "example_value" in n.meta
            and isinstance(n.meta["example_value"], torch.Tensor)
        )
        node = call(graph.graph, ops.shrink, x, w, 0.0, "activation")
    shape = node.meta["example_value"].shape
    assert isinstance(shape[0], torch.SymInt)
    assert shape[1:] == (17, 7)
