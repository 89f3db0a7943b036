"""Graphs of aten operators as Inductor sees them on a GPU, traced without one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def traced(function: Callable[..., object], *inputs: Tensor, device: str = "cuda") -> GraphModule:
    """Trace `function` on fakes like `inputs` on a device; the graph runs on the inputs too."""
    with FakeTensorMode():
        fakes = [
            torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device=device) for i in inputs
        ]
        return make_fx(function)(*fakes)


def targets(graph: GraphModule) -> list[str]:
    """Return the names of the operators, in order."""
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
