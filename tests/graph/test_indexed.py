"""What is said of a graph's values is compared with the values themselves, element by element."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from transformers import masking_utils

from lora_fx.graph.indexed import Known, indexed
from lora_fx.graph.lines import Line, Region, Value
from lora_fx.rewrite.driver import graph_modules

Function = Callable[..., Any]


def graph_of(function: Function, *args: Any, dynamic: bool = False) -> tuple[GraphModule, list]:
    """The one graph of a function, and its inputs."""
    found: list[tuple[GraphModule, list]] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        found.append((graph, inputs))
        return graph.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (only,) = found
    return only


def dense(value: Value, shape: torch.Size) -> Tensor:
    """The tensor that a line or region stands for."""
    if isinstance(value, Region):
        parts = [dense(line, shape) >= 0 for line in value.lines]
        return torch.stack([torch.ones(shape, dtype=torch.bool), *parts]).all(0)
    result = torch.full(shape, int(value.start))
    for d, step in enumerate(value.steps):
        result = result + (step * torch.arange(shape[d])).view(-1, *[1] * (len(shape) - d - 1))
    return result


class Compared(Interpreter):
    """Runs a graph and compares every tensor that is known."""

    def __init__(self, module: GraphModule, known: Known) -> None:
        super().__init__(module)
        self.known, self.equal = known, 0

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.known:
            want = dense(self.known[n], result.shape)
            assert torch.equal(result.to(want.dtype), want), n.format_node()
            self.equal += 1
        return result


def compared(function: Function, *args: Any) -> dict[str, Value]:
    """Compare all that is known of a function's graph; return it by name."""
    graph, inputs = graph_of(function, *args)
    known = indexed(graph)
    run = Compared(graph, known)
    run.run(*inputs)
    assert run.equal == len(known)
    return {node.name: value for node, value in known.items()}


def last(function: Function, *args: Any) -> Value | None:
    """What is known of the tensor that a function returns, compared."""
    graph, _ = graph_of(function, *args)
    (returned,) = graph.graph.find_nodes(op="output")[0].args[0]
    return compared(function, *args).get(returned.name)


def sdpa_mask(**settings: Any) -> Function:
    """transformers' own mask of 3 samples, 5 queries and 5 keys."""
    sizes = {"batch_size": 3, "q_length": 5, "kv_length": 5, "allow_is_causal_skip": False}
    return lambda *args: masking_utils.sdpa_mask(
        **sizes | settings, **({"attention_mask": args[0]} if args else {})
    )


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({}, 1),
        ({"q_length": 2, "q_offset": 3}, 1),
        ({"q_length": 1, "q_offset": 4}, 0),
        ({"kv_offset": 2, "q_offset": 2}, 1),
        ({"mask_function": masking_utils.sliding_window_causal_mask_function(3)}, 2),
        ({"mask_function": masking_utils.sliding_window_causal_mask_function(5)}, 1),
        ({"mask_function": masking_utils.bidirectional_mask_function}, 0),
    ],
)
def test_masks_of_transformers(settings: dict[str, Any], bounds: int) -> None:
    mask = last(sdpa_mask(**settings))
    assert isinstance(mask, Region)
    assert len(mask.lines) == bounds


@pytest.mark.parametrize(
    "settings",
    [
        {"mask_function": masking_utils.chunked_causal_mask_function(2, torch.zeros(3, dtype=int))},
        {"use_vmap": True},
    ],
)
def test_masks_of_which_nothing_is_said(settings: dict[str, Any]) -> None:
    assert last(sdpa_mask(**settings)) is None


def test_padding_is_unknown_unless_it_is_made_in_the_graph() -> None:
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert last(sdpa_mask(), mask) is None
    known = last(lambda m: sdpa_mask()(torch.ones_like(m)), mask)
    assert isinstance(known, Region)
    assert [(line.steps, line.start) for line in known.lines] == [((0, 0, 1, -1), 0)]


def packed(position_ids: Tensor) -> Tensor | None:
    return masking_utils.find_packed_sequence_indices(position_ids)


def test_positions_in_order_are_one_sequence() -> None:
    known = last(lambda x: packed(torch.arange(x.shape[1]).expand(x.shape)), torch.zeros(3, 5))
    assert isinstance(known, Line)
    assert (known.steps, known.start) == ((0, 0), 0)
    restarted = torch.tensor([[0, 1, 2, 0, 1]])
    assert last(packed, restarted) is None
    assert last(lambda x: packed(2 * torch.arange(x.shape[1]).expand(x.shape)), restarted) is None


def indices(x: Tensor) -> tuple[Tensor, ...]:
    """One of each rule, with sizes and steps that differ."""
    rows, columns = torch.arange(3, device=x.device), torch.arange(1, 8, 2)
    table = rows[:, None] * 10 - columns
    return (
        table,
        table[1:, ::2],
        table[2],
        table[..., 3],
        table[None, :, 1:2],
        table[rows[:2, None], torch.arange(4)],
        (table >= 0) & (table < 15),
        ~(table > 4),
        (columns == 3) | torch.ones(4, dtype=torch.bool),
        (table == table + 1) | (table <= 12),
        (rows - rows) != 0,
        torch.diff(table),
        torch.diff(table, prepend=table[:, :1] + 2),
        torch.full_like(table, 2).cumsum(-1),
        torch.ones_like(table).cumsum(0),
        torch.ones(3, 4).bool().int().unsqueeze(1).expand(3, 2, 4),
    )


def test_every_rule() -> None:
    graph, _ = graph_of(indices, torch.zeros(2))
    known = compared(indices, torch.zeros(2))
    returned = [node.name for node in graph.graph.find_nodes(op="output")[0].args[0]]
    unknown = [i for i, name in enumerate(returned) if name not in known]
    assert unknown == [13, 15]  # torch.full_like, and floating point


@pytest.mark.parametrize(
    "index", [(slice(-2, None),), (-1,), (slice(None), torch.tensor([0, 1]))], ids=str
)
def test_what_counts_from_the_end_or_mixes_is_unknown(index: tuple[Any, ...]) -> None:
    assert (
        last(lambda x: (torch.arange(3)[:, None] + torch.arange(4))[index], torch.ones(1)) is None
    )


def test_indices_that_count_from_the_end_are_unknown() -> None:
    assert last(lambda x: torch.arange(5)[torch.arange(3) - 1], torch.ones(1)) is None
    assert last(lambda x: torch.arange(5)[torch.arange(3) + 1], torch.ones(1)) is not None


def test_lengths_may_be_symbols() -> None:
    def masks(x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[0]
        order = torch.arange(n)
        return order[None] <= order[:, None], order[None] > order[:, None] - n

    graph, _ = graph_of(masks, torch.zeros(5), dynamic=True)
    known = indexed(graph)
    causal, everywhere = graph.graph.find_nodes(op="output")[0].args[0]
    assert [line.steps for line in known[causal].lines] == [(1, -1)]
    assert known[everywhere].lines == ()


def test_a_window_that_is_no_symbol_is_kept_where_it_may_bind() -> None:
    def masks(x: Tensor) -> Tensor:
        order = torch.arange(x.shape[0])
        return order[None] > order[:, None] - 8

    graph, _ = graph_of(masks, torch.zeros(5), dynamic=True)
    (mask,) = graph.graph.find_nodes(op="output")[0].args[0]
    assert len(indexed(graph)[mask].lines) == 1


def by_a_view(x: Tensor) -> Tensor:
    order = torch.arange(4)
    order.view(2, 2).add_(1)
    return order <= 2


def by_out(x: Tensor) -> Tensor:
    order = torch.arange(4)
    torch.add(order, 1, out=order)
    return order <= 2


def by_an_index(x: Tensor) -> Tensor:
    order = torch.arange(4)
    order[0] = 7
    return order <= 2


def by_an_operator(x: Tensor) -> Tensor:
    order = torch.arange(4)
    order += 1
    return order <= 2


@pytest.mark.parametrize("function", [by_a_view, by_out, by_an_index, by_an_operator])
def test_nothing_is_known_of_a_graph_that_changes_it_in_place(function: Function) -> None:
    assert last(function, torch.zeros(4)) is None


def test_what_is_changed_elsewhere_does_not_matter() -> None:
    def function(x: Tensor) -> Tensor:
        order = torch.arange(4)
        x.index_copy_(0, order, torch.ones(4))
        return order <= 2

    assert last(function, torch.zeros(4)) is not None


def test_what_is_not_changed_stays_known() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        order, other = torch.arange(4), torch.arange(5)
        before, zeros = order + 1, torch.zeros_like(order)
        order[:2].add_(1)
        return order, before, zeros, other

    graph, _ = graph_of(function, torch.zeros(4))
    known = compared(function, torch.zeros(4))
    returned = [node.name for node in graph.graph.find_nodes(op="output")[0].args[0]]
    assert [name in known for name in returned] == [False, False, True, True]


def test_a_body_that_changes_what_it_is_given() -> None:
    def function(x: Tensor) -> Tensor:
        order, other = torch.arange(4), torch.arange(5)

        def body(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
            a.add_(1)
            return x * (a <= 2) + b.sum()

        return torch.utils.checkpoint.checkpoint(body, order, other, x, use_reentrant=False)

    graph, _ = graph_of(function, torch.zeros(4, requires_grad=True))
    parts = list(graph_modules(graph))
    names = {node.name for node in indexed(graph)}
    assert len(parts) == 2
    assert "other" in names
    assert names.isdisjoint({"order", "le", "add_"})


def test_bodies_of_which_it_is_not_known_what_they_are_given() -> None:
    def function(x: Tensor) -> Tensor:
        order, other = torch.arange(4), torch.arange(5)
        branches = (lambda n, x: x + n[:2].sum(), lambda n, x: x - n[:3].sum())
        return torch.cond(x.sum() > 0, *branches, (order * 2, x)) + other.sum() + order.sum()

    graph, _ = graph_of(function, torch.zeros(4))
    assert len(list(graph_modules(graph))) == 3
    assert {node.name for node in indexed(graph)} == {"order", "other"}


def test_bodies_of_higher_order_operators() -> None:
    def body(mask: Tensor, x: Tensor) -> Tensor:
        return (mask & (x > 0)).sum() + mask[:2].sum()

    def function(x: Tensor) -> Tensor:
        order = torch.arange(4)
        return torch.utils.checkpoint.checkpoint(
            body, order[None] <= order[:, None], x, use_reentrant=False
        )

    graph, _ = graph_of(function, torch.zeros(4, requires_grad=True))
    inner = [part for part in graph_modules(graph) if part is not graph]
    known = indexed(graph)
    assert len(inner) == 1
    names = {node.name for node in known if node.graph is inner[0].graph}
    assert any("getitem" in name for name in names)
