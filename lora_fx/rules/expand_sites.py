"""Open each site into the shrinks and expands of its branches.

    before   %z = lora_fx.site(%y, %x, [%A, %B], %scalings, "linear[r4:p0.0:activation]")
    after    %h = lora_fx.shrink(%x, %A, 0.0, "activation")
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation")

z = y + Σᵢ sᵢ (dropᵢ(x) Aᵢᵀ) Bᵢᵀ          x: (*, in)  A: (r, in)  B: (out, r)  y: (*, out)
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3; several adapters add up.

Holds: with B = 0 the outputs are unchanged. Refuses: a site whose kind is not `linear`.
"""

from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import Structure
from lora_fx.rewrite.metadata import call
from lora_fx.rewrite.rule import Match, Miss


class ExpandSites:
    """site(y, x, …) → expand(… expand(y, shrink(x, A₀), B₀) …, shrink(x, Aₙ), Bₙ)."""

    name = "expand_sites"

    def match(self, node: Node) -> Match | Miss:
        """Match every `lora_fx::site` of a linear layer."""
        if node.op != "call_function" or node.target is not ops.site:
            return Miss("not a site")
        structure = Structure.parse(node.args[4])  # type: ignore[arg-type]
        if structure.kind != "linear":
            return Miss(f"no rule opens a site of kind `{structure.kind}`")
        return Match(node, {"structure": structure})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build one shrink and one expand per branch."""
        y, x, params, scalings, _ = match.node.args
        value = y
        for i, branch in enumerate(match["structure"].branches):
            A, B = params[2 * i], params[2 * i + 1]  # type: ignore[index]
            h = call(graph, ops.shrink, x, A, branch.dropout, branch.compute)
            value = call(graph, ops.expand, value, h, B, scalings, i, branch.compute)
        return value  # type: ignore[return-value]
