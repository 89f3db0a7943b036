"""Open each merge into the deltas of its branches.

    before   %w = lora_fx.merge(%W, [%A, %B], %scalings, "linear[r4:p0.0:activation]")
    after    %wide = %W.to(float32)
             %d = lora_fx.delta(%wide, %A, %B, %scalings[0], False)
             %w = %d.to(bfloat16)

W' = W + Σᵢ sᵢ Bᵢ Aᵢ    W: (out, in)  A: (r, in)  B: (out, r)
Hu et al. 2021, arXiv 2106.09685, §4.1. Of an embedding and a `Conv1D` W is (in, out) and the
product is transposed.

Holds: all is added in the dtype of the scalings, the widest of all, and rounded once. The weight
itself is not written to.
"""

import operator

from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import Structure
from lora_fx.rewrite.metadata import call, dtype
from lora_fx.rewrite.rule import Match, Miss


class ExpandMerges:
    """merge(W, …) → delta(… delta(W, A₀, B₀) …, Aₙ, Bₙ)."""

    name = "expand_merges"

    def match(self, node: Node) -> Match | Miss:
        """Match every `lora_fx::merge`."""
        if node.op != "call_function" or node.target is not ops.merge:
            return Miss("not a merge")
        return Match(node, {"structure": Structure.parse(node.args[3])})  # type: ignore[arg-type]

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build one delta per branch."""
        weight, params, scalings, _ = match.node.args
        structure: Structure = match["structure"]
        wide, narrow = dtype(scalings), dtype(weight)
        value = weight if wide == narrow else call(graph, "to", weight, wide)
        for i, (A, B, *_) in enumerate(structure.params(params)):  # type: ignore[arg-type]
            scaling = call(graph, operator.getitem, scalings, i)
            value = call(graph, ops.delta, value, A, B, scaling, structure.transposed)
        return value if wide == narrow else call(graph, "to", value, narrow)  # type: ignore[return-value]
