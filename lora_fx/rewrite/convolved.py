"""Nodes that convolve, as `graph/convolution.py` does."""

import torch.nn.functional as F
from torch.fx import Graph, Node

from lora_fx.graph.convolution import CONVOLUTIONS, Window, pointwise_of
from lora_fx.rewrite.metadata import EXAMPLE, call


def convolved(graph: Graph, x: object, weight: object, window: Window) -> Node:
    """Add the convolution of x (*, in, …) with a weight (out, in, k…)."""
    if window.around:
        x = call(graph, F.pad, x, window.around, window.pad_mode)
    function = CONVOLUTIONS[window.dimensions - 1]
    return call(graph, function, x, weight, None, *window.arguments)


def pointwise_mapped(graph: Graph, h: Node, B: Node, *bias: object) -> Node:
    """Add the map of h (*, r, …) by B (out, r / groups, 1…), or of h (*, r) by B (out, r)."""
    if B.meta[EXAMPLE].dim() == 2:
        return call(graph, F.linear, h, B, *bias)
    function, groups = pointwise_of(h.meta[EXAMPLE], B.meta[EXAMPLE])
    return call(graph, function, h, B, *(bias or (None,)), groups=groups)
