import torch
from expecttest import assert_expected_inline
from torch.fx import GraphModule

from lora_fx.graph import ops
from lora_fx.graph.text import text
from lora_fx.passes.share_shrinks import share_shrinks
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module, run
from tests.dense import relative
from tests.marked import Block, add_adapter


def block(**settings) -> Block:
    torch.manual_seed(0)
    block = Block()
    for name, rank in (("gate", 2), ("up", 3), ("down", 2)):
        add_adapter(getattr(block, name), "default", rank, **settings)
    return block


def adapted(module: Block) -> GraphModule:
    graph = capture_module(module, torch.randn(4, 5))
    apply([ExpandSites()], graph)
    return graph


def shrinks(graph: GraphModule) -> int:
    return sum(node.target is ops.shrink for node in graph.graph.nodes)


def test_text() -> None:
    graph = adapted(block())
    assert share_shrinks(graph) == 1
    assert_expected_inline(
        text(graph),
        """\
%l_x_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_x_, @gate.weight, @gate.bias)
%cat: f32[5, 5] = cat([@gate.lora_A.default.weight, @up.lora_A.default.weight])   # share_shrinks
%shrink_default_3: f32[4, 5] = lora_fx.shrink(%l_x_, %cat, 0.0, 'activation')   # share_shrinks
%split = split(%shrink_default_3, [2, 3], -1)   # share_shrinks
%getitem: f32[4, 2] = getitem(%split, 0)   # share_shrinks
%getitem_1: f32[4, 3] = getitem(%split, 1)   # share_shrinks
%expand_default: f32[4, 7] = lora_fx.expand(%output, %getitem, @gate.lora_B.default.weight, @gate.lora_scalings, 0, 'activation')   # expand_sites
%tanh: f32[4, 7] = tanh(%expand_default)
%output_1: f32[4, 7] = linear(%l_x_, @up.weight, None)
%expand_default_1: f32[4, 7] = lora_fx.expand(%output_1, %getitem_1, @up.lora_B.default.weight, @up.lora_scalings, 0, 'activation')   # expand_sites
%mul: f32[4, 7] = mul(%tanh, %expand_default_1)
%output_2: f32[4, 3] = linear(%mul, @down.weight, @down.bias)
%shrink_default_2: f32[4, 2] = lora_fx.shrink(%mul, @down.lora_A.default.weight, 0.0, 'activation')   # expand_sites
%expand_default_2: f32[4, 3] = lora_fx.expand(%output_2, %shrink_default_2, @down.lora_B.default.weight, @down.lora_scalings, 0, 'activation')   # expand_sites
%linear_3: f32[4, 11] = linear(%l_x_, @side.weight, @side.bias)
%sum_1: f32[4, 1] = .sum(%linear_3, -1, keepdim=True)
%add: f32[4, 3] = add(%expand_default_2, %sum_1)
return (%add)""",
    )


def test_outputs_and_gradients_stay() -> None:
    module = block()
    graph = adapted(module)
    share_shrinks(graph)
    x = torch.randn(4, 5)
    leaves = [p for name, p in module.named_parameters() if "lora" in name]
    want = torch.autograd.grad(module(x).square().sum(), leaves)
    got = torch.autograd.grad(run(graph, module, x).square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert b.norm() > 1e-2
        assert relative(a, b) < 1e-5


def test_dropout_masks_are_not_shared() -> None:
    graph = adapted(block(dropout=0.1))
    assert share_shrinks(graph) == 0
    assert shrinks(graph) == 3


def test_compute_dtypes_are_not_mixed() -> None:
    module = block()
    add_adapter(module.side, "default", 2, compute="float64")
    graph = adapted(module)
    assert share_shrinks(graph) == 1
    assert shrinks(graph) == 3
