"""Passes on the aten graph of each direction, as Inductor takes them.

Relies on `CustomGraphPass`, Inductor's way to see such a graph before its own passes;
`tests/graph/test_backends.py` holds it.
"""

from collections.abc import Callable

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from lora_fx.graph.own_code import own_code


class AtenPasses(CustomGraphPass):
    """Applies passes in their order; each changes a graph and returns how often."""

    def __init__(self, passes: tuple[Callable[[Graph], int], ...]) -> None:
        self._passes = passes

    def __call__(self, graph: Graph) -> None:
        """Apply them."""
        for rewrite in self._passes:
            rewrite(graph)

    def uuid(self) -> tuple[str, ...]:
        """Return what stands for the passes in the keys of Inductor's caches."""
        return own_code(), *(rewrite.__name__ for rewrite in self._passes)
