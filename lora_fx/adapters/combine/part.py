"""What one adapter does at a site, as the factors that are combined.

    W + s B A                               A, B, gain 1
    W_res + s B A = W + s B A − s₀ B₀ A₀    [A; A₀], [B, −s₀ / s B₀]    a weight that it changed
    diag(g) (W + s B A),  g = m / ‖W + s B A‖     A, diag(g) B, gain g       DoRA

so that in all cases it is diag(g) W + s B A of these. Blocks on a diagonal are whole matrices here.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lora_fx.adapters.sites.magnitudes import oriented_weight
from lora_fx.adapters.sites.site import Site
from lora_fx.graph.row_norms import row_norms


@dataclass(frozen=True)
class Part:
    """One branch with its weight in a mix; `scaling` is what multiplies B A (and b).

    A: (r, in), B: (out, r), `bias` and `gain`: (out,), in float32 or wider. A convolution's A is
    (r, in · k) and B (out, r / groups).
    """

    weight: float
    scaling: float
    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    gain: Tensor | None = None

    @property
    def factor(self) -> float:
        """What multiplies B A in the mix."""
        return self.weight * self.scaling


def part_of(site: Site, adapter: str, weight: float) -> Part:
    """Return what an adapter that is at a site does to the base's own weight there."""
    branch, arithmetic = site.lora_branches[adapter], site.lora_arithmetic[adapter]
    change = site.lora_change
    A, B = (factor.flatten(1) for factor in _wide(*branch.product()))
    A, B = (
        torch.block_diag(*factor.chunk(blocks))
        for factor, blocks in zip((A, B), arithmetic.blocks, strict=True)
    )
    bias = None if branch.B.bias is None else _wide(branch.B.bias)[0]
    if branch.magnitude is not None:
        (m,) = _wide(branch.magnitude.weight.flatten())
        gain = m / row_norms(oriented_weight(site).to(A.device), A, B, arithmetic.scaling)
        return Part(weight, arithmetic.scaling, A.to(gain.dtype), gain[:, None] * B, None, gain)
    if change is not None and change.adapter == adapter:
        own = _wide(change.factors.A.weight, change.factors.B.weight)
        A0, B0 = (factor.flatten(1) for factor in own)
        ratio = change.arithmetic.scaling / arithmetic.scaling
        A, B = torch.cat([A, A0]), torch.cat([B, -ratio * B0], 1)
    return Part(weight, arithmetic.scaling, A, B, bias)


def _wide(*own: Tensor) -> list[Tensor]:
    dtype = reduce(torch.promote_types, (torch.float32, *(tensor.dtype for tensor in own)))
    return [tensor.detach().to(dtype) for tensor in own]
