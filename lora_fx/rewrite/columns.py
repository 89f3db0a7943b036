"""Nodes that pick columns by numbers known when the graph is made: no index has to be copied."""

from collections.abc import Sequence

import torch
from torch.fx import Graph

from lora_fx.rewrite.metadata import call


def picked_out(graph: Graph, values: object, columns: object, dim: int) -> object:
    """Pick columns of a dimension: a view, where they follow each other."""
    assert isinstance(columns, Sequence)
    first, count = columns[0], len(columns)
    if list(columns) == list(range(first, first + count)):
        return call(graph, torch.narrow, values, dim, first, count)
    parts = [call(graph, torch.select, values, dim, column) for column in columns]
    return call(graph, torch.stack, parts, dim)
