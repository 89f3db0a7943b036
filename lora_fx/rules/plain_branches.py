"""Which branches of a site in a mixed batch are their two factors and a share, and what is left."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.structure import Branch, Structure
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype
from lora_fx.rewrite.rule import Match, Miss


def mixed_rows(node: Node) -> Structure | Miss:
    """Return the structure of a linear layer's site whose samples have adapters of their own."""
    if node.op != "call_function" or node.target is not ops.site:
        return Miss("not a site")
    structure = Structure.parse(node.args[4])  # type: ignore[arg-type]
    if len(node.args) < 7 or not structure.terms:
        return Miss("all samples have the same adapters")
    x = node.args[1].meta[EXAMPLE]  # type: ignore[union-attr]
    if structure.kind != "linear" or x.ndim not in (2, 3):
        return Miss("not the rows of a linear layer")
    return structure


def alike(node: Node, structure: Structure) -> list[list[int]]:
    """Return the places of branches that compute alike: in the same dtypes, with one dropout."""
    groups: dict[Any, list[int]] = defaultdict(list)
    dealt = structure.params(node.args[2])  # type: ignore[arg-type]
    for i, (branch, (A, B, *_)) in enumerate(zip(structure.branches, dealt, strict=True)):
        if _is_plain(branch) and not (branch.dropout and structure.terms != 1):
            groups[branch.dropout, branch.compute, dtype(A), dtype(B)].append(i)
    return list(groups.values())


def stackable(groups: list[list[int]], structure: Structure) -> list[list[int]]:
    """Set apart a branch of many adapters, which are in one tensor already."""
    many = {i for i, branch in enumerate(structure.branches) if branch.many}
    parts = (
        [i for i in group if (i in many) is apart] for group in groups for apart in (False, True)
    )
    return [part for part in parts if part]


def _is_plain(branch: Branch) -> bool:
    """Whether a branch, or each of its adapters, is two factors and a share."""
    own = {"column": branch.column, "many": branch.many}
    plain = Branch(branch.rank, branch.dropout, branch.compute, **own)
    return branch.column is not None and branch == plain


class Members(NamedTuple):
    """The adapters of some branches: their columns in the shares, places in scalings, and ranks."""

    columns: list[int]
    scalings: list[int]
    ranks: list[int]

    @classmethod
    def of(cls, structure: Structure, places: Sequence[int]) -> "Members":
        """Return those of the branches at some places; one branch can be many adapters."""
        members = cls([], [], [])
        for place in places:
            branch = structure.branches[place]
            assert branch.column is not None
            for i in range(branch.many or 1):
                members.columns.append(branch.column + i)
                members.scalings.append(place + i)
                members.ranks.append(branch.rank)
        return members


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
    counts = [structure.branches[i].many or 1 for i in left]
    parts = [call(graph, torch.narrow, scalings, 0, *own) for own in zip(left, counts, strict=True)]
    scalings = call(graph, torch.cat, parts)
    return call(graph, ops.site, y, x, params, scalings, str(own), base, *of_call)


def _flat(tensors: Sequence[Any]) -> list[Any]:
    """Return what a branch has, without what it has not; its priors are two."""
    each = (one if isinstance(one, tuple) else (one,) for one in tensors)
    return [one for some in each for one in some if one is not None]
