"""Graphs of aten operators as Inductor sees them, traced as on a GPU without one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

cast = torch.ops.prims.convert_element_type.default


def traced(function: Callable[..., Any], *inputs: Tensor, device: str = "cpu") -> GraphModule:
    """Trace `function` on fakes like `inputs` on a device; the graph runs on the inputs too."""
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=device) for i in inputs
        ]
        return make_fx(function)(*fakes)


def rewritten(rewrite: Callable[..., int], module: GraphModule, made: int = 1) -> GraphModule:
    """Apply a pass that is to make so many changes."""
    assert rewrite(module.graph) == made
    module.graph.lint()
    module.recompile()
    return module


def operators(module: GraphModule) -> list[str]:
    """Return the names of the operators, in order."""
    calls = (node for node in module.graph.nodes if node.op == "call_function")
    return [str(node.target).removeprefix("aten.").split(".default")[0] for node in calls]
