"""Open each site into the shrinks and expands of its branches.

    before   %z = lora_fx.site(%y, %x, [%A, %B], %scalings, "linear[r4:p0.0:activation]", [])
    after    %h = lora_fx.shrink(%x, %A, 0.0, "activation")
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation")

z = y + Σᵢ sᵢ ((dropᵢ(x) Aᵢᵀ) Bᵢᵀ + bᵢ)    x: (*, in)  A: (r, in)  B: (out, r)  y: (*, out)
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3; several adapters add up. At an embedding `lookup`
stands for `shrink`: x would be one-hot. At a convolution `convolve` does.

With a magnitude m (Liu et al. 2024, arXiv 2402.09353, eq. 5) a branch makes of W x, which is y
without the base's bias, (m / n) (W + s B A) x, and adds what that is more:

    after    %u = lora_fx.expand(%y, %h, %B, …)                      y + s B A x
             %n = lora_fx.norms(%W, %A, %B, %scalings, 0, 1.0)
             %z = lora_fx.magnitude(%u, %u, %m, %n, %base_bias)

Behind another branch the first argument is what that one left, with this one's expand added to it.
With dropout, y is replaced by W drop(x), which is computed for it, in the second. The norms at a
convolution are of factors and weight seen as matrices, and one for each channel. Of a weight in 4
or 8 bits they are `packed_norms`, and W drop(x) is `packed_linear`.

In a mixed batch each sample has a share in the branch, by which what the branch adds is multiplied:

    after    %c = lora_fx.share(%samples, 0, False, 3)               (S, 1, 1)
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation", None, %c)

A branch that acts from its invocation on (aLoRA) has a share in each token, 0 or 1, by which that
of its sample, if there is one, is multiplied:

    after    %c = lora_fx.invoked(%invoked, 0, %x)                   (S, T, 1)
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation", None, %c)

Where tokens are routed, as "linear^2/1.0[…]" says, a share is of a token too, and all branches have
theirs from one comparison of x with their prototypes:

    after    %r = lora_fx.arrow(%x, %prototypes, 2, 1.0)             (*, branches)
             %c = torch.narrow(%r, -1, 0, 1)                         (*, 1)
             %z = lora_fx.expand(%y, %h, %B, %scalings, 0, "activation", None, %c)

Factors that consist of blocks become whole matrices first: `lora_fx.block_diagonal(%A, 2)`. A
diagonal d between B and A scales the columns of B: `lora_fx.diagonal(%B, %d)`. MonteCLoRA draws
its A first: `lora_fx.perturb(%A, %std, %prior, 0.0001)`.

In a stack of matrices, of experts, these are `stack_shrink` and `stack_expand`; the shares are of
its rows.

Holds: with B and b zero, and m the norms of W, the outputs are unchanged.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from lora_fx.graph import ops
from lora_fx.graph.convolution import Window
from lora_fx.graph.packed import packed_linear
from lora_fx.graph.structure import Branch, Structure
from lora_fx.rewrite.convolved import convolved
from lora_fx.rewrite.metadata import EXAMPLE, call
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
        structure: Structure = match["structure"]
        return (_stack if structure.is_stack else _layer)(graph, match.node, structure)


def _layer(graph: Graph, node: Node, structure: Structure) -> Node:
    y, x, params, scalings, _, base, *shared = node.args
    samples, invoked, prototypes = (*shared, None, None, None)[:3]
    value, window = y, structure.window
    dealt = structure.params(params)  # type: ignore[arg-type]
    flat = {}
    if window is not None and base:
        of_dora = (t for A, B, _, m, *_ in dealt if m is not None for t in (A, B))
        flat = {t: call(graph, torch.flatten, t, 1) for t in (base[0], *of_dora)}  # type: ignore[index]
    weight, of_layer = structure.weight(base)  # type: ignore[arg-type]
    arrow = structure.arrow
    routed = None if arrow is None else call(graph, ops.arrow, x, prototypes, *arrow)
    of_call = x, samples, invoked, routed
    for i, (A, B, bias, m, v, d, priors) in enumerate(dealt):
        branch = structure.branches[i]
        A, B = (
            call(graph, ops.block_diagonal, factor, blocks) if blocks > 1 else factor
            for factor, blocks in zip((A, B), branch.blocks, strict=True)
        )
        B = B if d is None else call(graph, ops.diagonal, B, d)
        A = A if priors is None else call(graph, ops.perturb, A, *priors, branch.noise)
        drawn, dropout = x, branch.dropout
        if m is not None and dropout:
            drawn, dropout = call(graph, F.dropout, x, dropout, True), 0.0
        if structure.kind == "embedding":
            h = call(graph, ops.lookup, x, A, structure.padding, branch.compute)
        elif v is not None:
            compression = v, branch.groups, branch.scale, dropout, branch.compute
            h = call(graph, ops.compressed_shrink, x, A, *compression)
        elif window is not None:
            h = call(graph, ops.convolve, drawn, A, dropout, branch.compute, str(window))
        else:
            h = call(graph, ops.shrink, drawn, A, dropout, branch.compute)
        share = _share(graph, i, branch, h.meta[EXAMPLE].ndim, *of_call)
        factors = h, B, scalings, i, branch.compute, bias
        before, value = value, call(graph, ops.expand, value, *_without_none(*factors, *share))
        if m is not None:
            own, base_bias = y, of_layer
            if drawn is not x:
                own, base_bias = _applied(graph, drawn, weight, structure), []
            alone = own is before and not share
            u = value if alone else call(graph, ops.expand, own, *_without_none(*factors))
            matrices = [flat.get(t, t) for t in (*weight, A, B)]
            norms = _norms(graph, matrices, (scalings, i, structure.factor), structure)
            own_values = (_by_channel(graph, t, window) for t in (m, norms, *base_bias))
            gained = *own_values, *([] if base_bias else [None]), *share
            value = call(graph, ops.magnitude, value, u, *_without_none(*gained))
    return value  # type: ignore[return-value]


def _share(
    graph: Graph,
    place: int,
    branch: Branch,
    dims: int,
    x: object,
    samples: object,
    invoked: object,
    routed: Node | None,
) -> list[Node]:
    """Return what the branch has of each sample, or of each token; nothing if it has all."""
    if routed is not None:
        return [call(graph, torch.narrow, routed, -1, place, 1)]
    share = []
    if branch.column is not None:
        share = [call(graph, ops.share, samples, branch.column, branch.rest, dims)]
    if branch.invoked is not None:
        acts = call(graph, ops.invoked, invoked, branch.invoked, x)
        share = [call(graph, torch.mul, *share, acts) if share else acts]
    return share


def _stack(graph: Graph, node: Node, structure: Structure) -> Node:
    value, x, params, scalings, _, base, *shared = node.args
    samples = shared[0] if shared else None
    offsets = base[0] if base else None  # type: ignore[index]
    for i, (A, B, *_) in enumerate(structure.params(params)):  # type: ignore[arg-type]
        branch = structure.branches[i]
        h = call(graph, ops.stack_shrink, x, A, offsets, branch.compute)
        share = _share(graph, i, branch, h.meta[EXAMPLE].ndim, x, samples, None, None)
        factors = h, B, scalings, i, branch.compute, offsets, *share
        value = call(graph, ops.stack_expand, value, *factors)
    return value  # type: ignore[return-value]


def _without_none(*args: object) -> tuple[object, ...]:
    """Leave out what stands last and is None."""
    return _without_none(*args[:-1]) if args and args[-1] is None else args


def _applied(graph: Graph, x: object, weight: list[object], structure: Structure) -> Node:
    """Apply the base's weight."""
    if structure.packing is not None:
        return call(graph, packed_linear, x, weight, str(structure.packing))
    if structure.window is not None:
        return convolved(graph, x, weight[0], structure.window)
    return call(graph, F.linear, x, weight[0])


def _norms(
    graph: Graph, matrices: list[Any], scaling: tuple[Any, ...], structure: Structure
) -> Node:
    """Return the norms of a branch; A and B come last of the matrices."""
    *weight, A, B = matrices
    if structure.packing is not None:
        packing = str(structure.packing)
        return call(graph, ops.packed_norms, weight, A, B, *scaling, packing)
    return call(graph, ops.norms, *weight, A, B, *scaling)


def _by_channel(graph: Graph, values: object, window: Window | None) -> object:
    """Lay one value for each channel along an output's channels."""
    if window is None:
        return values
    return call(graph, torch.reshape, values, (-1, *(1,) * window.dimensions))
