"""`lora_fx::augmented_products`: layers with one input, each with its branches in one product.

    yᵢ = [x | h | 0] [Wᵢ | Bᵢ]ᵀ + bᵢ          Wᵢ: (outᵢ, in), with room   bᵢ: (outᵢ,) or None

xa: (m, in + ROOM), x and beside it nothing yet      hidden: all branches' h, (m, rⱼ) each
Bᵢ: (outᵢ, ROOM), the layer's own B in the columns of its h, zero in the others

h is written beside x, and B into the room beside W (`graph/room.py`), before the products. What
lies in either place is nobody's but this operator's: x and W are what they were. So a weight serves
one call at a time, and threads that run a model with different adapters need `layout = plain`. Sums
are in float32 and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fx.graph.room import ROOM, owns_room, room_of

_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "augmented_products(Tensor xa, Tensor[] weights, Tensor[] factors, Tensor?[] biases) "
    "-> Tensor[]",
    tags=(torch.Tag.flexible_layout,),
)


def _products(
    xa: Tensor,
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    return [_product(xa, *rest) for rest in zip(weights, factors, biases, strict=True)]


def _product(xa: Tensor, W: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = W.shape
    if not owns_room(W):  # a copy that has the strides and not the room
        first = xa[:, columns:], B.t()
        total = torch.mm(*first) if bias is None else torch.addmm(bias, *first)
        return total.addmm_(xa[:, :columns], W.t())
    room_of(W).copy_(B)
    whole = W.as_strided((rows, columns + ROOM), W.stride(), W.storage_offset()).t()
    return torch.mm(xa, whole) if bias is None else torch.addmm(bias, xa, whole)


def _shapes(
    xa: Tensor,
    weights: Sequence[Tensor],
    factors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    return [xa.new_empty((xa.shape[0], weight.shape[0])) for weight in weights]


_library.impl("augmented_products", _products, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::augmented_products", _shapes, lib=_library)

augmented_products = torch.ops.lora_fx.augmented_products.default
