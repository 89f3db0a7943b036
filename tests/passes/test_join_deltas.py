import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.passes.join_deltas import join_deltas
from lora_fx.passes.lower import lower
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_merges import ExpandMerges
from tests.dense import relative
from tests.rules.test_expand_merges import KEYS, dense, graph_of, inputs


def adapted(kind: str, dtype: torch.dtype) -> GraphModule:
    graph = graph_of(kind, dtype)
    apply([ExpandMerges()], graph)
    return graph


def test_text() -> None:
    graph = adapted("transposed", torch.bfloat16)
    assert join_deltas(graph) == 1
    assert_expected_inline(
        text(graph),
        """\
%w: bf16[5, 7] = input
%a0: f32[2, 5] = input
%b0: f32[7, 2] = input
%a1: f32[3, 5] = input
%b1: f32[7, 3] = input
%scalings: f32[2] = input
%to: f32[5, 7] = .to(%w, torch.float32)   # expand_merges
%getitem: f32[] = getitem(%scalings, 0)   # expand_merges
%getitem_1: f32[] = getitem(%scalings, 1)   # expand_merges
%mul: f32[7, 2] = mul(%b0, %getitem)   # join_deltas
%mul_1: f32[7, 3] = mul(%b1, %getitem_1)   # join_deltas
%cat: f32[5, 5] = cat([%a0, %a1])   # join_deltas
%cat_1: f32[7, 5] = cat([%mul, %mul_1], 1)   # join_deltas
%delta_default_2: f32[5, 7] = lora_fx.delta(%to, %cat, %cat_1, None, True)   # join_deltas
%to_1: bf16[5, 7] = .to(%delta_default_2, torch.bfloat16)   # expand_merges
return %to_1""",
    )
    assert join_deltas(graph) == 0


def test_joined_and_lowered_it_is_the_dense_sum() -> None:
    for kind in KEYS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            given = inputs(kind, dtype)
            graph = adapted(kind, dtype)
            join_deltas(graph)
            want = dense(*given).to(dtype)
            error = {torch.float32: 2e-7, torch.float64: 1e-15, torch.bfloat16: 0}[dtype]
            assert relative(graph(*given), want) <= error
            lower(graph)
            assert not [node for node in graph.graph.nodes if node.target is ops.delta]
            assert relative(graph(*given), want) <= error
            assert relative(given[0], want) > 0.1


def test_deltas_that_others_read_are_left_alone() -> None:
    graph = adapted("linear", torch.float32)
    first, _ = (node for node in graph.graph.nodes if node.target is ops.delta)
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0], first),)
    graph.recompile()
    want = graph(*inputs("linear", torch.float32))
    assert join_deltas(graph) == 0
    for a, b in zip(graph(*inputs("linear", torch.float32)), want, strict=True):
        assert torch.equal(a, b)
