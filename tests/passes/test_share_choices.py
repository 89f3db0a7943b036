"""What is computed of the samples' shares is computed once, and nothing else is taken for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import lora_fx
from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.passes.share_choices import share_choices
from tests.runtime.mixed import mixed
from tests.tiny import tokens

SPEC = """lora 1
adapter a { rank = 4 init = random target linear }
adapter b { rank = 3 init = random target linear }
route { when "half" -> 0.5 * a + 0.5 * b }
compile { unit = model }
"""


@torch.no_grad()
def test_all_layers_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "are_on", lambda *_: True)
    model, ids = mixed(SPEC, "eager"), tokens(3, 1)
    names = ["a", "b", "half"]
    program: Any = lora_fx.capture(model, input_ids=ids, adapter_names=names)
    text = program.text("fused")
    counted = {what: text.count(f"= {what}(") for what in ("lora_fx.choose", "gather")}
    assert counted == {"lora_fx.choose": 1, "gather": 1}
    assert text.count("= lora_fx.picked_expand(") > 4


class Asking(nn.Module):
    """Asks for the places of the shares of `x`, of `y` and of sums of them."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        places = [ops.choose(of, [0, 2], 1) for of in (x, x, y, x + y, x + y)]
        places += [ops.choose(x, [0, 1], 1), ops.choose(x, [0, 2], 2)[:, :1]]
        return torch.stack(places)


def test_what_is_asked_of_something_else_stays() -> None:
    x, y = torch.randn(40, 3), torch.randn(40, 3)
    module = torch.fx.symbolic_trace(Asking(), concrete_args=None)
    want = module(x, y)
    assert share_choices(module) == 1
    assert len(choices(module.graph)) == 6
    assert torch.equal(module(x, y), want)
    assert len(want.unique(dim=0)) > 3


def choices(graph: Graph) -> list[Any]:
    return graph.find_nodes(op="call_function", target=ops.choose)


def test_a_graph_without_samples() -> None:
    module: GraphModule = torch.fx.symbolic_trace(nn.Linear(3, 4))
    assert share_choices(module) == 0
