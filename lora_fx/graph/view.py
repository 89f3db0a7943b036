"""The graph as a `networkx.DiGraph`, for questions of order and reachability."""

import networkx as nx
from torch.fx import GraphModule

from lora_fx.graph.text import FQN


def dependencies(module: GraphModule) -> nx.DiGraph:
    """Return nodes by name, with an edge from each node to every user of its value.

    Node attributes: `op`, `target`, and where they apply `fqn` (of a weight) and `lora_fx` (what
    made the node).
    """
    graph = nx.DiGraph()
    for node in module.graph.nodes:
        attributes = {"op": node.op, "target": str(node.target)}
        if FQN in node.meta:
            attributes["fqn"] = node.meta[FQN]
        if "lora_fx" in node.meta:
            attributes["lora_fx"] = node.meta["lora_fx"]
        graph.add_node(node.name, **attributes)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph
