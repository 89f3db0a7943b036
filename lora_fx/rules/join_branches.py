"""Compute the branches of a mixed batch's site in one product down and one up.

    before   %z = lora_fx.site(%y, %x, [%A0, %B0, %A1, %B1], %scalings, "linear[r4:…:+s0|r3:…:+s1]",
                               [], %samples)
    after    %A = torch.cat([%A0, %A1])                                   (Σ r, in)
             %B = torch.cat([%B0, %B1], 1)                                (out, Σ r)
             %s = lora_fx.spread(%scalings, [0, 1], [4, 3])               (Σ r,)
             %c = lora_fx.spread(%samples, [0, 1], [4, 3])                (S, Σ r)
             %h = lora_fx.shrink(%x, %A, 0.0, "activation")               (S, …, Σ r)
             %z = lora_fx.masked_expand(%y, %h, %B, %s, %c, "activation")

z = y + Σᵢ cᵢ sᵢ (x Aᵢᵀ) Bᵢᵀ (Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3): a product with factors
beside each other is the sum of those with each. A GPU launches a few kernels instead of some for
each adapter: `tests/benchmarks/mixed_batch.py --train` times it.

Of many adapters that lie in one tensor, turned and flattened ones stand for what `cat` makes.

Left as they are: branches that are more than two factors and a share, that compute in different
dtypes, and such with dropout where a sample can have several, each with a mask of its own.

Holds: a sample without a share is what it was, bit for bit.
"""

import torch
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import Structure
from lora_fx.rewrite.metadata import call
from lora_fx.rewrite.rule import Match, Miss
from lora_fx.rules.plain_branches import Members, alike, others, stackable


class JoinBranches:
    """site(y, x, …, samples) → masked_expand(site(y, x, others), shrink(x, cat …), cat …)."""

    name = "join_branches"

    def match(self, node: Node) -> Match | Miss:
        """Match a site with several branches that are alike; `groups` are the places of those."""
        if node.op != "call_function" or node.target is not ops.site:
            return Miss("not a site")
        structure = Structure.parse(node.args[4])  # type: ignore[arg-type]
        if len(node.args) < 7 or node.args[6] is None:
            return Miss("all samples have the same adapters")
        if structure.kind != "linear":
            return Miss("not a linear layer")
        groups = stackable(alike(node, structure), structure)
        found = [places for places in groups if len(Members.of(structure, places).ranks) > 1]
        if not found:
            return Miss("no two branches are alike")
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
            if first.many:
                A, B, *_ = dealt[places[0]]
                A = call(graph, torch.flatten, A, 0, 1)
                B = call(graph, torch.flatten, call(graph, "transpose", B, 0, 1), 1)
            else:
                A = call(graph, torch.cat, [dealt[i][0] for i in places])
                B = call(graph, torch.cat, [dealt[i][1] for i in places], 1)
            s = call(graph, ops.spread, scalings, numbers, ranks)
            c = call(graph, ops.spread, samples, columns, ranks)
            h = call(graph, ops.shrink, x, A, first.dropout, first.compute)
            value = call(graph, ops.masked_expand, value, h, B, s, c, first.compute)
        return value  # type: ignore[return-value]
