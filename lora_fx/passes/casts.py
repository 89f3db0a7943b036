"""Nodes in the dtype in which a branch computes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.fx import Graph

from lora_fx.graph.autocast import without_autocast
from lora_fx.graph.structure import ACTIVATION
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype


def cast(graph: Graph, node: object, wanted: torch.dtype) -> object:
    """Return a node in a dtype: itself, if it is."""
    return node if dtype(node) == wanted else call(graph, "to", node, wanted)


def arithmetic(graph: Graph, x: object, compute: object) -> AbstractContextManager[Any]:
    """Keep a named compute dtype under autocast; `activation` leaves autocast in charge."""
    if compute == ACTIVATION:
        return nullcontext()
    return without_autocast(graph, x.meta[EXAMPLE].device.type)  # type: ignore[attr-defined]
