"""Nodes that switch autocast off around some arithmetic, as Dynamo writes `with torch.autocast`.

Relies on `torch.amp._enter_autocast` and `_exit_autocast`, the pair Dynamo itself puts into graphs
and AOTAutograd runs while it traces; `tests/graph/test_autocast.py` holds that.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph

AUTOCAST_TARGETS = (_enter_autocast, _exit_autocast)


@contextmanager
def without_autocast(graph: Graph, device: str) -> Iterator[None]:
    """Nodes made inside run without autocast; adds nothing where autocast cannot be on."""
    if not _may_be_on(graph, device):
        yield
        return
    entered = graph.call_function(_enter_autocast, (device, None, False, None))
    with torch.autocast(device, enabled=False):
        yield
    graph.call_function(_exit_autocast, (entered,))


def _may_be_on(graph: Graph, device: str) -> bool:
    """Ask the ambient state: Dynamo guards it, so it is the one the graph will run in."""
    return torch.is_autocast_enabled(device) or any(
        node.target is _enter_autocast for node in graph.nodes
    )
