"""Tell each site in a graph which adapters and which lines of the spec put it there."""

import re
from collections.abc import Mapping

from torch.fx import GraphModule, Node

from lora_fx.adapters.sites.parameter_site import SITES
from lora_fx.graph import ops
from lora_fx.graph.inputs import named_input
from lora_fx.graph.structure import Structure
from lora_fx.graph.text import FQN
from lora_fx.plan.sites import SitePlan
from lora_fx.rewrite.driver import graph_modules

_FACTOR = re.compile(r"(.+?)(?:\.lora_experts)?\.lora_(?:embedding_)?A\.([^.]+)\.weight")


def annotate(module: GraphModule, planned: Mapping[tuple[str, str], SitePlan]) -> None:
    """Set `meta["lora_fx"]` of every site node to its adapters and `file:line` of their rules.

    `planned` is keyed by (name, adapter). Loaded adapters have no line.
    """
    for part in graph_modules(module):
        for node in part.graph.nodes:
            if node.target is ops.site:
                node.meta["lora_fx"] = _describe(node, planned)


def _describe(node: Node, planned: Mapping[tuple[str, str], SitePlan]) -> dict[str, str]:
    adapters, lines = [], []
    structure = Structure.parse(node.args[4])  # type: ignore[arg-type]
    for A, *_ in structure.params(node.args[2]):  # type: ignore[arg-type]
        found = _FACTOR.fullmatch(named_input(A).meta.get(FQN, ""))
        if found is None:
            continue
        fqn, adapter = found[1].replace(f".{SITES}.", "."), found[2]
        adapters.append(adapter)
        if (fqn, adapter) in planned:
            rule = planned[fqn, adapter].rule
            lines.append(f"{rule.source.name}:{rule.line}")
    described = {"adapters": ", ".join(adapters), "spec": ", ".join(dict.fromkeys(lines))}
    return {key: value for key, value in described.items() if value}
