import pytest
import torch
from torch import nn

from lora_fx.graph.verify import InvalidGraph, verify
from lora_fx.rewrite.driver import apply
from lora_fx.rewrite.metadata import call
from lora_fx.rules.expand_sites import ExpandSites
from tests.captured import capture_module
from tests.marked import add_adapter


def graph():
    model = nn.Sequential(nn.Linear(5, 7))
    add_adapter(model[0], "default", 2)
    return capture_module(model, torch.randn(4, 5))


def test_each_stage_has_its_operators() -> None:
    module = graph()
    verify(module, "captured", "capture")
    for stage in ("adapted", "fused", "lowered"):
        with pytest.raises(InvalidGraph, match="`lora_fx::site` is not legal here"):
            verify(module, stage, "nothing")
    apply([ExpandSites()], module)
    verify(module, "adapted", "rules")
    with pytest.raises(InvalidGraph, match=r"after `rules` the graph is not `lowered`"):
        verify(module, "lowered", "rules")


def test_a_new_node_that_nothing_uses() -> None:
    module = graph()
    apply([ExpandSites()], module)
    last = next(n for n in module.graph.nodes if n.op == "output")
    with module.graph.inserting_before(last):
        stray = call(module.graph, torch.neg, last.args[0][0])
    stray.meta["lora_fx"] = {"rule": "stray"}
    with pytest.raises(InvalidGraph, match="%neg: made and never used"):
        verify(module, "adapted", "stray")


def test_a_new_node_without_an_example_value() -> None:
    module = graph()
    apply([ExpandSites()], module)
    node = next(n for n in module.graph.nodes if "lora_fx" in n.meta)
    del node.meta["example_value"]
    with pytest.raises(InvalidGraph, match="a new node without an example value"):
        verify(module, "adapted", "rules")
