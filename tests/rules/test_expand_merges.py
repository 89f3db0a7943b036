import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Graph, GraphModule

from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.rewrite.driver import apply, misses
from lora_fx.rewrite.metadata import EXAMPLE, call
from lora_fx.rules.expand_merges import ExpandMerges
from tests.dense import relative

KEYS = {"linear": "linear[r2:p0.0:activation|r3:p0.0:activation]"}
KEYS["transposed"] = KEYS["linear"].replace("linear", "transposed")


def inputs(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """A weight of 7 x 5, two adapters of rank 2 and 3, and their scalings."""
    torch.manual_seed(0)
    weight = torch.randn((7, 5) if kind == "linear" else (5, 7), dtype=dtype)
    factors = [torch.randn(shape) for shape in ((2, 5), (7, 2), (3, 5), (7, 3))]
    wide = torch.promote_types(dtype, torch.float32)
    return [weight, *factors, torch.tensor([0.5, -1.5], dtype=wide)]


def graph_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> GraphModule:
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("W", "A0", "B0", "A1", "B1", "scalings")]
    for node, tensor in zip(nodes, inputs(kind, dtype), strict=True):
        node.meta[EXAMPLE] = tensor.to("meta")
    graph.output(call(graph, ops.merge, nodes[0], nodes[1:5], nodes[5], KEYS[kind]))
    return GraphModule(torch.nn.Module(), graph)


def test_text() -> None:
    graph = graph_of("linear")
    assert apply([ExpandMerges()], graph) == {"expand_merges": 1}
    assert_expected_inline(
        text(graph),
        """\
%w: bf16[7, 5] = input
%a0: f32[2, 5] = input
%b0: f32[7, 2] = input
%a1: f32[3, 5] = input
%b1: f32[7, 3] = input
%scalings: f32[2] = input
%to: f32[7, 5] = .to(%w, torch.float32)   # expand_merges
%getitem: f32[] = getitem(%scalings, 0)   # expand_merges
%delta_default: f32[7, 5] = lora_fx.delta(%to, %a0, %b0, %getitem, False)   # expand_merges
%getitem_1: f32[] = getitem(%scalings, 1)   # expand_merges
%delta_default_1: f32[7, 5] = lora_fx.delta(%delta_default, %a1, %b1, %getitem_1, False)   # expand_merges
%to_1: bf16[7, 5] = .to(%delta_default_1, torch.bfloat16)   # expand_merges
return %to_1""",
    )


def dense(weight: Tensor, *rest: Tensor) -> Tensor:
    A0, B0, A1, B1, scalings = (tensor.double() for tensor in rest)
    delta = scalings[0] * B0 @ A0 + scalings[1] * B1 @ A1
    return weight.double() + (delta if weight.shape == delta.shape else delta.T)


def test_it_is_the_dense_sum_rounded_once() -> None:
    for kind in KEYS:
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs(kind, dtype)
            want = dense(*given)
            for graph in (graph_of(kind, dtype), graph_of(kind, dtype)):
                got = graph(*given)
                assert got.dtype is dtype
                rounded = want.to(dtype).double()
                assert relative(got, rounded) < 1e-6
                assert relative(given[0], want) > 0.1
                apply([ExpandMerges()], graph)
                assert torch.equal(graph(*given), got)


def test_other_nodes_are_missed_with_a_reason() -> None:
    graph = graph_of("linear")
    apply([ExpandMerges()], graph)
    assert {reason for _, _, reason in misses([ExpandMerges()], graph)} == {"not a merge"}
