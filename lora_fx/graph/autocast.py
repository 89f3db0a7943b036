"""Nodes that switch autocast off around some arithmetic, as Dynamo writes `with torch.autocast`.

Relies on `torch.amp._enter_autocast` and `_exit_autocast`, the pair Dynamo itself puts into graphs
and AOTAutograd runs while it traces; `tests/graph/test_autocast.py` holds that.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph

AUTOCAST_TARGETS = (_enter_autocast, _exit_autocast)


def autocast_off(device: str) -> AbstractContextManager[object]:
    """Return a context without autocast; meta tensors have none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@contextmanager
def without_autocast(graph: Graph, device: str) -> Iterator[None]:
    """Nodes made inside run without autocast; adds nothing where autocast cannot be on."""
    if not may_be_on(graph, device):
        yield
        return
    entered = graph.call_function(_enter_autocast, (device, None, False, None))
    with autocast_off(device):
        yield
    graph.call_function(_exit_autocast, (entered,))


def may_be_on(graph: Graph, device: str) -> bool:
    """Return whether nodes of a graph can run under autocast.

    It asks the ambient state too: Dynamo guards it, so it is the one the graph will run in.
    """
    return torch.amp.is_autocast_available(device) and (
        torch.is_autocast_enabled(device)
        or any(node.target is _enter_autocast for node in graph.nodes)
    )
