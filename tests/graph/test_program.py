import networkx as nx
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import lora_fx
from lora_fx.graph.verify import STAGES
from tests.marked import Block
from tests.tiny import llama, spec, tokens

TEXT = """lora 1
adapter default {
  rank = 2
  target up, gate
  target down { dropout = 0.1 }
}"""


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).mean(-1, keepdim=True)
        return x


def program(**settings) -> lora_fx.capture:
    model = lora_fx.compile(Stack(), TEXT, backend="eager")
    return lora_fx.capture(model, x=torch.randn(4, 5), **settings)


@pytest.mark.parametrize("stage", STAGES)
def test_stages(stage: str) -> None:
    text = program(layer=1).text(stage)
    assert ("lora_fx.site" in text) == (stage == "captured")
    assert ("lora_fx.shrink" in text) == (stage in ("adapted", "fused"))
    assert ("share_shrinks" in text) == (stage in ("fused", "lowered"))
    assert "lora_fx." not in text or stage != "lowered"


def test_lowered_text() -> None:
    assert_expected_inline(
        program(layer=1).text("lowered"),
        """\
%l_args_0_: f32[4, 5] = input
%output: f32[4, 7] = linear(%l_args_0_, @gate.weight, @gate.bias)
%cat: f32[4, 5] = cat([@gate.lora_A.default.weight, @up.lora_A.default.weight])   # share_shrinks | default | <text>:4
%linear: f32[4, 4] = linear(%l_args_0_, %cat)   # share_shrinks/lower | default | <text>:4
%split = split(%linear, [2, 2], -1)   # share_shrinks | default | <text>:4
%getitem: f32[4, 2] = getitem(%split, 0)   # share_shrinks | default | <text>:4
%getitem_1: f32[4, 2] = getitem(%split, 1)   # share_shrinks | default | <text>:4
%getitem_2: f32[] = getitem(@gate.lora_scalings, 0)   # expand_sites/lower | default | <text>:4
%mul_1: f32[4, 2] = mul(%getitem, %getitem_2)   # expand_sites/lower | default | <text>:4
%linear_5: f32[4, 7] = linear(%mul_1, @gate.lora_B.default.weight)   # expand_sites/lower | default | <text>:4
%add_1: f32[4, 7] = add(%output, %linear_5)   # expand_sites/lower | default | <text>:4
%tanh: f32[4, 7] = tanh(%add_1)
%output_1: f32[4, 7] = linear(%l_args_0_, @up.weight, None)
%getitem_3: f32[] = getitem(@up.lora_scalings, 0)   # expand_sites/lower | default | <text>:4
%mul_2: f32[4, 2] = mul(%getitem_1, %getitem_3)   # expand_sites/lower | default | <text>:4
%linear_6: f32[4, 7] = linear(%mul_2, @up.lora_B.default.weight)   # expand_sites/lower | default | <text>:4
%add_2: f32[4, 7] = add(%output_1, %linear_6)   # expand_sites/lower | default | <text>:4
%mul: f32[4, 7] = mul(%tanh, %add_2)
%output_2: f32[4, 3] = linear(%mul, @down.weight, @down.bias)
%dropout: f32[4, 7] = dropout(%mul, 0.1, True)   # expand_sites/lower | default | <text>:5
%linear_4: f32[4, 2] = linear(%dropout, @down.lora_A.default.weight)   # expand_sites/lower | default | <text>:5
%getitem_4: f32[] = getitem(@down.lora_scalings, 0)   # expand_sites/lower | default | <text>:5
%mul_3: f32[4, 2] = mul(%linear_4, %getitem_4)   # expand_sites/lower | default | <text>:5
%linear_7: f32[4, 3] = linear(%mul_3, @down.lora_B.default.weight)   # expand_sites/lower | default | <text>:5
%add_3: f32[4, 3] = add(%output_2, %linear_7)   # expand_sites/lower | default | <text>:5
%linear_3: f32[4, 11] = linear(%l_args_0_, @side.weight, @side.bias)
%sum_1: f32[4, 1] = .sum(%linear_3, -1, keepdim=True)
%add: f32[4, 3] = add(%add_3, %sum_1)
return (%add)""",
    )


def test_sizes_as_symbols() -> None:
    assert "%l_args_0_: f32[s0, 5] = input" in program(dynamic=True).text("captured")


def test_capturing_leaves_the_model_alone() -> None:
    model = lora_fx.compile(llama(3), spec(), backend="eager")
    units = [layer.lora_fx_unit for layer in model.model.layers]
    before = model(tokens()).logits
    lora_fx.capture(model, layer=2, input_ids=tokens())
    assert [layer.lora_fx_unit for layer in model.model.layers] == units
    assert torch.equal(model(tokens()).logits, before)


def test_meta_gives_the_same_graph() -> None:
    def text(device: str) -> str:
        with torch.device(device):
            model = lora_fx.compile(llama(3), spec(), backend="eager")
        ids = tokens().to(device)
        return lora_fx.capture(model, layer=1, input_ids=ids, use_cache=False).text()

    assert text("meta") == text("cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_computes_the_layer(stage: str) -> None:
    model = lora_fx.compile(
        Stack(), TEXT.replace("0.1", "0").replace("rank", "init = random rank"), backend="eager"
    )
    x = torch.randn(4, 5)
    captured = lora_fx.capture(model, layer=0, x=x)
    graph = captured.at(stage)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = [
        tensors[n.meta["lora_fx_fqn"]] if "lora_fx_fqn" in n.meta else x
        for n in graph.graph.nodes
        if n.op == "placeholder"
    ]
    assert torch.allclose(graph(*inputs)[0], model.blocks[0](x), atol=1e-6)


def test_dependencies() -> None:
    graph = program(layer=0).to_networkx("adapted")
    assert nx.is_directed_acyclic_graph(graph)
    shrinks = [n for n, data in graph.nodes(data=True) if "shrink" in data["target"]]
    assert len(shrinks) == 3
    assert nx.has_path(graph, shrinks[0], shrinks[2])
    assert not nx.has_path(graph, shrinks[0], shrinks[1])


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(lora_fx.LoraFxError, match="there is no layer 2: the model has 2"):
        program(layer=2)
    with pytest.raises(lora_fx.LoraFxError, match="compile with `backend`"):
        lora_fx.capture(lora_fx.compile(Stack(), TEXT, backend=None), x=torch.randn(4, 5))
