"""Give each sample of a mixed batch its own factors, where that is cheaper than to compute all.

    before   %z = lora_fx.site(%y, %x, [%A0, %B0, …], %scalings, "linear~1[r4:…:+s0|r3:…:+s1|…]",
                               [], %samples)
    after    %which = lora_fx.choose(%samples, [0, 1, …], 1)              (S, k), of the columns
             %f = lora_fx.sample_scalings(%samples, %scalings, [0, 1, …], [0, 1, …], %which)
             %A = lora_fx.pick([%A0, %A1, …], %which, 4, False)           (S, k r, in)
             %B = lora_fx.pick([%B0, %B1, …], %which, 4, True)            (S, out, k r)
             %h = lora_fx.sample_shrink(%x, %A, 0.0, "activation")        (S, T, k r)
             %z = lora_fx.sample_expand(%y, %h, %B, %f, "activation")

z_s = y_s + Σⱼ f_sj (x_s A_sjᵀ) B_sjᵀ over the at most k adapters that sample s has a share c in,
f = s c. It is the same sum as over all adapters, whose other terms are zero (Hu et al. 2021, arXiv
2106.09685, §4.1, eq. 3).

Of many adapters that lie in one tensor, `lora_fx.take(%stack, %which, False)` stands for `pick`.

`dispatch_costs.py` decides, by the sizes that the graph is first made for; it is right at any. Left
as they are, in a site that computes all: branches that are more than two factors (a bias,
magnitudes, a diagonal, blocks), what an adapter took out of the weight, embeddings and
convolutions, dropout where a sample can have several adapters, each with a mask of its own, an
adapter that is two branches, as a multiplier makes it beside what it took out of the weight, and
sites whose rows have more than two dimensions before the features.

Holds: a sample without a share is what it was, bit for bit. What is in an adapter that it has no
share in, NaN too, does not reach it.
"""

from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.picked import pick
from lora_fx.graph.structure import Structure
from lora_fx.rewrite.metadata import EXAMPLE, call, likely_size
from lora_fx.rewrite.rule import Match, Miss
from lora_fx.rules.dispatch_costs import is_gathered
from lora_fx.rules.plain_branches import Members, alike, mixed_rows, others, stackable


class GatherSamples:
    """site(y, x, …, samples) → sample_expand(site(y, x, others), sample_shrink(x, pick …), …)."""

    name = "gather_samples"

    def match(self, node: Node) -> Match | Miss:
        """Match a site where branches are cheaper to gather; `groups` are the places of those."""
        structure = mixed_rows(node)
        if isinstance(structure, Miss):
            return structure
        x = node.args[1].meta[EXAMPLE]  # type: ignore[union-attr]
        size = [likely_size(n) for n in x.shape[:-1]]
        found = []
        for places in stackable(alike(node, structure), structure):
            columns, _, ranks = Members.of(structure, places)
            once = len(set(columns)) == len(columns)
            if once and is_gathered(x.device.type, size[0], (*size, 1)[1], ranks, structure.terms):
                found.append(places)
        if not found:
            return Miss("to compute every adapter costs less")
        return Match(node, {"structure": structure, "groups": found})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build the other branches' site, and what each group adds to it."""
        _, x, params, scalings, _, _, samples, *_ = match.node.args
        structure: Structure = match["structure"]
        dealt = structure.params(params)  # type: ignore[arg-type]
        value = others(graph, match)
        for places in match["groups"]:
            first = structure.branches[places[0]]
            columns, numbers, ranks = Members.of(structure, places)
            which = call(graph, ops.choose, samples, columns, min(structure.terms, len(columns)))
            factors = call(graph, ops.sample_scalings, samples, scalings, columns, numbers, which)
            if first.many:
                stacks = enumerate(dealt[places[0]][:2])
                A, B = (call(graph, ops.take, t, which, by_columns > 0) for by_columns, t in stacks)
            else:
                rank = max(ranks)
                A = call(graph, pick, [dealt[i][0] for i in places], which, rank, False)
                B = call(graph, pick, [dealt[i][1] for i in places], which, rank, True)
            compute, dropout = first.compute, first.dropout
            h = call(graph, ops.sample_shrink, x, A, dropout, compute)
            value = call(graph, ops.sample_expand, value, h, B, factors, compute)
        return value  # type: ignore[return-value]
