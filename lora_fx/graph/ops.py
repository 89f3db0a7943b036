"""The `lora_fx::` operators and their reference implementations.

    site(y, x, params, scalings, structure)      y + sum_i s_i * B_i A_i drop_i(x)
    shrink(x, A, dropout, compute)               drop(x) Aᵀ
    expand(y, h, B, scalings, branch, compute)   y + (s h) Bᵀ

x: (*, in)   A: (r, in)   B: (out, r)   y: (*, out)   h: (*, r)   scalings: float32 (branches,)
Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3.

All are CompositeImplicitAutograd: one node in a captured graph, decomposed by autograd and
`torch.compile`, so no derivative or shape formula has to be kept in step. They are the plain
differentiable path that every rewrite is compared with.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.graph.structure import ACTIVATION, Structure, compute_dtype

_library = torch.library.Library("lora_fx", "DEF")
_library.define(
    "site(Tensor y, Tensor x, Tensor[] params, Tensor scalings, str structure) -> Tensor"
)
_library.define("shrink(Tensor x, Tensor A, float dropout, str compute) -> Tensor")
_library.define(
    "expand(Tensor y, Tensor h, Tensor B, Tensor scalings, int branch, str compute) -> Tensor"
)


def shrink_reference(x: Tensor, A: Tensor, dropout: float, compute: str) -> Tensor:
    """Project the input to the rank space: `drop(x) Aᵀ`, x (*, in), A (r, in) -> (*, r)."""
    dtype = compute_dtype(compute, x.dtype)
    if dropout:
        x = F.dropout(x, dropout, training=True)
    with _arithmetic(x, compute):
        return F.linear(x.to(dtype), A.to(dtype))


def expand_reference(
    y: Tensor, h: Tensor, B: Tensor, scalings: Tensor, branch: int, compute: str
) -> Tensor:
    """Add one branch to the base output: `y + (s h) Bᵀ`, h (*, r), B (out, r) -> (*, out)."""
    dtype = compute_dtype(compute, h.dtype)
    with _arithmetic(h, compute):
        delta = F.linear((h * scalings[branch]).to(dtype), B.to(dtype))
    return y + delta.to(y.dtype)


def site_reference(
    y: Tensor, x: Tensor, params: list[Tensor], scalings: Tensor, structure: str
) -> Tensor:
    """Add every branch of a site to its base output `y`; `params` is A₀, B₀, A₁, B₁, …."""
    for i, branch in enumerate(Structure.parse(structure).branches):
        A, B = params[2 * i], params[2 * i + 1]
        h = shrink_reference(x, A, branch.dropout, branch.compute)
        y = expand_reference(y, h, B, scalings, i, branch.compute)
    return y


def _arithmetic(x: Tensor, compute: str):
    """Keep a named compute dtype under autocast; `activation` leaves autocast in charge."""
    if compute == ACTIVATION:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


_library.impl("site", site_reference, "CompositeImplicitAutograd")
_library.impl("shrink", shrink_reference, "CompositeImplicitAutograd")
_library.impl("expand", expand_reference, "CompositeImplicitAutograd")

site = torch.ops.lora_fx.site.default
shrink = torch.ops.lora_fx.shrink.default
expand = torch.ops.lora_fx.expand.default
