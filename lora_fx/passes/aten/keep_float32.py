"""Let a product write the float32 that it is cast to. A pass on compiled graphs, on a GPU.

    before   %g = aten.mm(%dhᵀ, %x)          bf16      after   %g = aten.mm(%dhᵀ, %x, float32)
             %dA = convert(%g, float32)

The gradients of float32 factors are such products of half-precision tensors. They are accumulated
in float32 as before, and no longer rounded in between.
"""

import torch
from torch.fx import Graph, Node

from lora_fx.passes.aten.nodes import CAST, HALF, args, aten, call, value


def keep_float32(graph: Graph) -> int:
    """Rewrite every such product; return how many there were."""
    casts = [node for node in graph.nodes if node.target is CAST and _casts_a_product(node)]
    for cast in casts:
        with graph.inserting_before(cast):
            product = args(cast)[0]
            wide = call(graph, cast, aten.mm.dtype, *args(product), torch.float32)
        cast.replace_all_uses_with(wide)
    if casts:
        graph.eliminate_dead_code()
    return len(casts)


def _casts_a_product(cast: Node) -> bool:
    product: Node = args(cast)[0]
    return (
        args(cast)[1] == torch.float32
        and product.target is aten.mm.default
        and len(product.users) == 1
        and value(product).dtype in HALF
        and value(product).device.type == "cuda"
    )
