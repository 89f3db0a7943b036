"""Let kernels take each sample's factors where they lie, where no gradient is wanted.

    before   %z = lora_fx.site(%y, %x, [%A0, %B0, %As, %Bs], %scalings,
                               "linear~1[r4:…:+s0|r8:…:+s1*6]", [], %samples)
    after    %which = lora_fx.choose(%samples, [0, 1, …, 6], 1)           (S, k), of the columns
             %c = torch.gather(torch.narrow(%samples, 1, 0, 7), 1, torch.clamp(%which, 0))
             %h = lora_fx.picked_shrink(%x, [%A0, %As], 1, %which, 8, 1024, d)
             %h = torch.sum(%h, 1, True)                                  unless T is 1
             %z = lora_fx.picked_expand([%y], %h, [%B0, %Bs], %which, %c, [%scalings], d, "")[0]

z_s = y_s + Σⱼ c_sj f_j (x_s A_jᵀ) B_jᵀ over the at most k adapters that sample s has a share c in
(Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3): `kernels/picked_products.py`. Adapters with tensors
of their own and such in one tensor share the kernels.

`dispatch_costs.py` decides. Left as they are, for `gather_samples` or `join_branches`: what needs
a gradient, dropout, autocast, more than a few adapters with tensors of their own, ranks above 64,
and branches that are more than two factors.

Holds: a sample without a share is what it was, bit for bit. What is in an adapter that it has no
share in, NaN too, does not reach it.
"""

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.graph.autocast import may_be_on
from lora_fx.graph.structure import Structure, compute_dtype
from lora_fx.kernels.picked_products import (
    MAX_RANK,
    MOST_SINGLE,
    picked_expand,
    picked_shrink,
)
from lora_fx.rewrite.columns import picked_out
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rewrite.rule import Match, Miss
from lora_fx.rules.plain_branches import Members, alike, mixed_rows, others

PART = {True: 512, False: 2048}  # features that one program goes over: of single rows, of more
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PickInKernel:
    """site(y, x, …, samples) → picked_expand(site(y, x, others), picked_shrink(x, …), …)."""

    name = "pick_in_kernel"

    def match(self, node: Node) -> Match | Miss:
        """Match a site with adapters among which kernels can choose; `groups` are their places."""
        structure = mixed_rows(node)
        if isinstance(structure, Miss):
            return structure
        x = node.args[1].meta[EXAMPLE]  # type: ignore[union-attr]
        if x.dtype not in _DTYPES:
            return Miss("a dtype that kernels do not compute in")
        if node.meta[EXAMPLE].requires_grad:
            return Miss("gradients are wanted")
        if may_be_on(node.graph, x.device.type):
            return Miss("autocast decides what products are computed in")
        groups = alike(node, structure) if kernels.are_on(x.device.type) else []
        found = [places for places in groups if _can_be_picked(structure, places, x.dtype)]
        if not found:
            return Miss("no branches that are cheaper to pick in a kernel")
        return Match(node, {"structure": structure, "groups": found})

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build the other branches' site, and what each group adds to it."""
        _, x, params, scalings, _, _, samples, *_ = match.node.args
        structure: Structure = match["structure"]
        dealt = structure.params(params)  # type: ignore[arg-type]
        value = others(graph, match)
        is_row = x.meta[EXAMPLE].ndim == 2  # type: ignore[union-attr]
        if is_row:
            x, value = (call(graph, "unsqueeze", one, 1) for one in (x, value))
        is_single = statically_known_true(x.meta[EXAMPLE].shape[1] == 1)  # type: ignore[union-attr]
        for places in match["groups"]:
            columns, numbers, ranks = Members.of(structure, places)
            which = call(graph, ops.choose, samples, columns, min(structure.terms, len(columns)))
            own = picked_out(graph, samples, columns, 1)
            shares = call(graph, torch.gather, own, 1, call(graph, torch.clamp, which, 0))
            factors = [[dealt[i][0] for i in places], [dealt[i][1] for i in places]]
            wanted = compute_dtype(structure.branches[places[0]].compute, dtype(x))
            how = which, max(ranks), PART[is_single], wanted
            h = call(graph, picked_shrink, x, factors[0], 1, *how)
            if not is_single:
                h = call(graph, torch.sum, h, 1, True)
            own = [picked_out(graph, scalings, numbers, 0)]
            how = which, shares, own, wanted, ""
            z = call(graph, picked_expand, [value], h, factors[1], *how)
            value = call(graph, operator.getitem, z, 0)
        return call(graph, "squeeze", value, 1) if is_row else value  # type: ignore[return-value]


def _can_be_picked(structure: Structure, places: list[int], activation: torch.dtype) -> bool:
    """Whether the kernels can choose among these branches."""
    columns, _, ranks = Members.of(structure, places)
    first = structure.branches[places[0]]
    return (
        len(set(columns)) == len(columns) > 1
        and max(ranks) <= MAX_RANK
        and sum(not structure.branches[i].many for i in places) <= MOST_SINGLE
        and not first.dropout
        and compute_dtype(first.compute, activation) in _DTYPES
    )
