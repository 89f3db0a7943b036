"""Compute the norms of W + s B A from the factors; W is read once for all adapters on it.

    before   %n0 = lora_fx.norms(%W, %A0, %B0, %scalings, 0, f)      A0: (r0, in)   B0: (out, r0)
             %n1 = lora_fx.norms(%W, %A1, %B1, %scalings, 1, f)      A1: (r1, in)   B1: (out, r1)
    after    %own = vector_norm(%W, dim=1)                           (out,)
             %wa0, %wa1 = split(mm(%W, cat([%A0, %A1])ᵀ), [r0, r1], 1)
             %n0 = sqrt(%own² + s₀ · sum(%B0 · (2 %wa0 + s₀ %B0 (%A0 %A0ᵀ)), 1))     …

Where W is in 4 or 8 bits, a few rows of it are unpacked at a time:

    before   %n0 = lora_fx.packed_norms([%W, %absmax], %A0, %B0, %scalings, 0, f, packing)    …
    after    %own, %wa = lora_fx.packed_rows([%W, %absmax], cat([%A0, %A1]), packing)         …

On a GPU, W in half precision and with one norm is read once, and nothing is made of it:

    before   %n = lora_fx.norms(%W, %A, %B, %scalings, 0, f)
    after    %n = sqrt(sum(lora_fx.row_squares(%W, %A, %B, s), 0))

The equation and its rounding are those of `graph/row_norms.py`, without autocast; nothing of it has
a gradient. The pass leaves neither `norms` nor `packed_norms` in the graph.
"""

import operator
from collections import defaultdict

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx import kernels
from lora_fx.graph import ops
from lora_fx.graph.autocast import without_autocast
from lora_fx.graph.packed import packed_rows
from lora_fx.graph.packing import Packing
from lora_fx.graph.row_norms import LEAST
from lora_fx.kernels.row_squares import MAX_RANK, row_squares
from lora_fx.rewrite.driver import graph_modules
from lora_fx.rewrite.metadata import EXAMPLE, call, dtype, inherit


def factor_dora_norm(module: GraphModule) -> int:
    """Factor every norm; return how many weights have one."""
    weights = 0
    for part in graph_modules(module):
        groups: dict[Node, list[Node]] = defaultdict(list)
        for node in part.graph.nodes:
            if node.target is ops.norms:
                groups[node.args[0]].append(node)
            elif node.target is ops.packed_norms:
                groups[node.args[0][0]].append(node)
        for weight, norms in groups.items():
            _factor(part.graph, weight, norms)
        weights += len(groups)
        part.graph.lint()
        part.recompile()
    return weights


def _factor(graph: Graph, weight: Node, norms: list[Node]) -> None:
    before = set(graph.nodes)
    with (
        graph.inserting_before(norms[0]),
        without_autocast(graph, weight.meta[EXAMPLE].device.type),
    ):
        if len(norms) == 1 and _is_in_kernel(norms[0]):
            squares = [_squares(graph, *norms)]
        else:
            squares = _from_factors(graph, norms)
        for node, square in zip(norms, squares, strict=True):
            root = call(graph, torch.sqrt, call(graph, torch.clamp_min, square, LEAST))
            node.replace_all_uses_with(root)
    provenance = norms[0].meta.get("lora_fx", {})
    for node in (node for node in graph.nodes if node not in before):
        inherit(node, norms[0])
        node.meta["lora_fx"] = {**provenance, "rule": "factor_dora_norm"}
    for node in norms:
        graph.erase_node(node)


def _is_in_kernel(norms: Node) -> bool:
    """Whether a kernel computes a norm: in half precision on a GPU."""
    if norms.target is not ops.norms:
        return False
    tensors = [node.meta[EXAMPLE] for node in norms.args if isinstance(node, Node)]
    W, A, B, _ = tensors
    narrow = W.dtype in (torch.bfloat16, torch.float16) and B.dtype.itemsize <= 4
    together = all(tensor.device == W.device for tensor in tensors)
    return narrow and together and A.shape[0] <= MAX_RANK and kernels.are_on(W.device.type)


def _squares(graph: Graph, norms: Node) -> Node:
    W, A, B, scalings, branch, factor = norms.args
    tensors = (call(graph, "detach", one) for one in (W, A, B))
    scaling = _scaling(graph, scalings, branch, factor)
    return call(graph, torch.sum, call(graph, row_squares, *tensors, scaling), 0)


def _from_factors(graph: Graph, norms: list[Node]) -> list[Node]:
    """Return the squares of the norms of one weight with some factors each."""
    first = norms[0].args
    is_packed = norms[0].target is ops.packed_norms
    narrow = Packing.parse(first[6]).dtype if is_packed else dtype(first[0])  # type: ignore[arg-type]
    wide = torch.promote_types(narrow, torch.float32)
    factors = [_cast(graph, call(graph, "detach", n.args[1]), narrow) for n in norms]
    stacked = call(graph, torch.cat, factors) if len(factors) > 1 else factors[0]
    if is_packed:
        both = call(graph, packed_rows, first[0], stacked, first[6])
        own, products = (call(graph, operator.getitem, both, i) for i in range(2))
    else:
        W = call(graph, "detach", first[0])
        own = call(graph, torch.linalg.vector_norm, W, 2, 1, dtype=wide)
        products = call(graph, torch.mm, W, call(graph, "t", stacked))
    square = call(graph, torch.square, own)
    return [
        _square(graph, node, A, square, inner)
        for node, A, inner in zip(norms, factors, _split(graph, products, factors), strict=True)
    ]


def _square(graph: Graph, norms: Node, A: Node, own: Node, inner: Node) -> Node:
    """Return the squares of the norms, given those of W and W Aᵀ."""
    wide = dtype(own)
    _, _, B, *scaling = norms.args[:6]
    B = _cast(graph, call(graph, "detach", B), wide)
    s = _scaling(graph, *scaling)
    A, inner = _cast(graph, A, wide), _cast(graph, inner, wide)
    gram = call(graph, torch.mm, A, call(graph, "t", A))
    quadratic = call(graph, torch.mul, s, call(graph, torch.mm, B, gram))
    both = call(graph, torch.add, call(graph, torch.mul, inner, 2), quadratic)
    branch = call(graph, torch.sum, call(graph, torch.mul, B, both), 1)
    return call(graph, torch.add, own, call(graph, torch.mul, s, branch))


def _scaling(graph: Graph, scalings: object, branch: object, factor: object) -> Node:
    scaling = call(graph, torch.select, scalings, 0, branch)
    return call(graph, torch.div, scaling, factor) if factor != 1 else scaling


def _split(graph: Graph, products: Node, factors: list[Node]) -> list[Node]:
    """Return W Aᵀ (out, r) for each A, from the product of all."""
    if len(factors) == 1:
        return [products]
    ranks = [A.meta[EXAMPLE].shape[0] for A in factors]
    split = call(graph, torch.split, products, ranks, 1)
    return [call(graph, operator.getitem, split, i) for i in range(len(factors))]


def _cast(graph: Graph, node: Node, wanted: torch.dtype) -> Node:
    return node if dtype(node) == wanted else call(graph, "to", node, wanted)
