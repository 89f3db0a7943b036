"""Which branches of a site in a mixed batch are their two factors and a share, and what is left."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import Branch, Structure
from lora_fx.rewrite.metadata import call, dtype
from lora_fx.rewrite.rule import Match


def alike(node: Node, structure: Structure) -> list[list[int]]:
    """Return the places of branches that can share their products: what they have is alike."""
    groups: dict[Any, list[int]] = defaultdict(list)
    dealt = structure.params(node.args[2])  # type: ignore[arg-type]
    for i, (branch, (A, B, *_)) in enumerate(zip(structure.branches, dealt, strict=True)):
        if _is_plain(branch) and not (branch.dropout and structure.terms != 1):
            groups[branch.dropout, branch.compute, dtype(A), dtype(B)].append(i)
    return list(groups.values())


def _is_plain(branch: Branch) -> bool:
    """Whether a branch is its two factors and a share."""
    plain = Branch(branch.rank, branch.dropout, branch.compute, column=branch.column)
    return branch.column is not None and branch == plain


def others(graph: Graph, match: Match) -> object:
    """Build the site of the branches in no group; without any it is the base's output."""
    y, x, params, scalings, _, base, *of_call = match.node.args
    structure: Structure = match["structure"]
    grouped = {i for places in match["groups"] for i in places}
    left = [i for i in range(len(structure.branches)) if i not in grouped]
    if not left:
        return y
    own = replace(structure, branches=tuple(structure.branches[i] for i in left), terms=0)
    dealt = structure.params(params)  # type: ignore[arg-type]
    params = [tensor for i in left for tensor in _flat(dealt[i])]
    parts = [call(graph, torch.select, scalings, 0, i) for i in left]
    scalings = call(graph, torch.stack, parts)
    return call(graph, ops.site, y, x, params, scalings, str(own), base, *of_call)


def _flat(tensors: Sequence[Any]) -> list[Any]:
    """Return what a branch has, without what it has not; its priors are two."""
    each = (one if isinstance(one, tuple) else (one,) for one in tensors)
    return [one for some in each for one in some if one is not None]
