"""Open each site into the shrinks and expands of its branches.

    before   %z = lora_fx.site(%y, %x, [%A, %B], %scalings, "linear[r4:p0.0:activation]")
    after    %h = lora_fx.shrink(%x, %A, 0.0, "activation")
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation")

z = y + Σᵢ sᵢ ((dropᵢ(x) Aᵢᵀ) Bᵢᵀ + bᵢ)    x: (*, in)  A: (r, in)  B: (out, r)  y: (*, out)
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3; several adapters add up. At an embedding `lookup`
stands for `shrink`: x would be one-hot.

Holds: with B and b zero the outputs are unchanged.
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
        """Match every `lora_fx::site`."""
        if node.op != "call_function" or node.target is not ops.site:
            return Miss("not a site")
        return Match(node, {"structure": Structure.parse(node.args[4])})  # type: ignore[arg-type]

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build one shrink or lookup and one expand per branch."""
        y, x, params, scalings, _ = match.node.args
        structure: Structure = match["structure"]
        value = y
        for i, (A, B, bias) in enumerate(structure.params(params)):  # type: ignore[arg-type]
            branch = structure.branches[i]
            if structure.kind == "embedding":
                h = call(graph, ops.lookup, x, A, structure.padding, branch.compute)
            else:
                h = call(graph, ops.shrink, x, A, branch.dropout, branch.compute)
            more = () if bias is None else (bias,)
            value = call(graph, ops.expand, value, h, B, scalings, i, branch.compute, *more)
        return value  # type: ignore[return-value]
