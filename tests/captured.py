"""Capture the graph of a small module as Dynamo sees it."""

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lora_fx.graph.inputs import name_inputs, tensor_names


def capture_module(module: nn.Module, *args: Any) -> GraphModule:
    """Return the one graph of `module(*args)`, its weights named."""
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        name_inputs(graph, inputs, tensor_names(module))
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(module, backend=backend, fullgraph=True)(*args)
    (graph,) = graphs
    return graph


def run(graph: GraphModule, module: nn.Module, *data: Any) -> Any:
    """Run a captured graph on the module's live tensors and new data."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = iter(data)
    inputs = [
        tensors[node.meta["lora_fx_fqn"]] if "lora_fx_fqn" in node.meta else next(values)
        for node in graph.graph.nodes
        if node.op == "placeholder"
    ]
    return graph(*inputs)[0]
