"""`lora_fx::sum_of_products`: a sum of matrix products in one buffer, added up by the products.

    sum_of_products([P₀, P₁, …], [Q₀, Q₁, …], b)  =  P₀ Q₀ + b + P₁ Q₁ + …

Pᵢ: (m, kᵢ)   Qᵢ: (kᵢ, n)   b: (n,) or None      or Pᵢ: (S, m / S, kᵢ)   Qᵢ: (S, kᵢ, n)

-> (m, n). The last product is of the first kind; those of the second are S products, one for each
part of the rows.

Each product after the first reads what is there while it multiplies and writes the sum (β = 1 in
GEMM's terms), so a low-rank product before a large one costs one write of the output, and no pass
that adds. Rounding: in float32 within a product, to the dtype after each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "sum_of_products(Tensor[] left, Tensor[] right, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def _accumulated(
    left: Sequence[Tensor], right: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    p, q = left[0], right[0]
    if p.dim() == 2:
        total = torch.mm(p, q) if bias is None else torch.addmm(bias, p, q)
    else:
        parts = torch.bmm(p, q) if bias is None else torch.baddbmm(bias, p, q)
        total = parts.flatten(0, 1)
    for p, q in zip(left[1:], right[1:], strict=True):
        if p.dim() == 2:
            torch.addmm(total, p, q, out=total)
        else:
            parts = total.unflatten(0, p.shape[:2])
            torch.baddbmm(parts, p, q, out=parts)
    return total


def _shape(left: Sequence[Tensor], right: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    return left[-1].new_empty((left[-1].shape[0], right[-1].shape[1]))


_library.impl("sum_of_products", _accumulated, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::sum_of_products", _shape, lib=_library)

sum_of_products = torch.ops.lora_fx.sum_of_products.default
