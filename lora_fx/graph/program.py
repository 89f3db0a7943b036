"""A captured program: one FX graph that can be looked at in each of its stages."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from lora_fx.graph.text import text
from lora_fx.graph.verify import Stage

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Program:
    """One captured graph; `graph_module` is at stage `captured`.

    `fqn` is the module it is the forward of, the empty string for a whole model.
    """

    graph_module: GraphModule
    fqn: str
    rewrite: Callable[[GraphModule, Stage], GraphModule]

    def at(self, stage: Stage) -> GraphModule:
        """Return a copy of the graph, rewritten up to `stage`; it runs as it is."""
        return self.rewrite(copy.deepcopy(self.graph_module), stage)

    def text(self, stage: Stage = "lowered") -> str:
        """Return the graph at a stage as stable text; weights are named within `fqn`."""
        return text(self.at(stage), self.fqn)

    def to_networkx(self, stage: Stage = "lowered") -> "nx.DiGraph":
        """Return the data dependencies at a stage."""
        from lora_fx.graph.view import dependencies

        return dependencies(self.at(stage))
