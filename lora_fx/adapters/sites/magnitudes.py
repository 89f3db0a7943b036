"""DoRA's magnitudes: where they start, and the weight that an adapter with them stands for."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.graph.row_norms import packed_row_norms, row_norms
from lora_fx.plan.offloaded import values_of
from lora_fx.plan.packed import packed_tensors, packing_of, unpacked


def start(site: Site, factors: Iterable[Tensor], scaling: float) -> Tensor:
    """Return the norms (out,) of the rows of W + s B A, with which m / n is 1; A and B come first.

    Of an embedding, and of `Conv1D`, the rows of the weight that is (out, in). Of a convolution,
    the norms of its output channels, (1, out, 1…).
    """
    A, B, *_ = factors
    packing = packing_of(site)
    if packing is not None:
        tensors = [tensor.to(A.device) for tensor in packed_tensors(site)]
        return packed_row_norms(tensors, A, B, scaling, str(packing))
    norms = row_norms(oriented_weight(site).to(A.device), A.flatten(1), B.flatten(1), scaling)
    return norms.view(1, -1, *(1,) * (A.dim() - 2)) if A.dim() > 2 else norms


@torch.no_grad()
def begin(site: Site, adapter: str, device: torch.device | None = None) -> None:
    """Let the magnitudes of an adapter that is here start, on the weight that is here.

    Computed on the device, if one is given.
    """
    factors, scaling = site.lora_branches[adapter], site.lora_arithmetic[adapter].scaling
    assert factors.magnitude is not None
    A, B = (one.weight.to(device or one.weight.device) for one in (factors.A, factors.B))
    factors.magnitude.weight.copy_(start(site, (A, B), scaling))


@torch.no_grad()
def effective_delta(site: Site, adapter: str, weight: Tensor | None = None) -> Tensor:
    """Return what an adapter adds to a weight, (out, in), in float32 or its wider dtype.

    s B A, or with a magnitude m `diag(m / ‖W + s B A‖) (W + s B A) - W`, the norms of rows: Liu et
    al. 2024, arXiv 2402.09353, eq. 5. W (out, in) is the given weight, by default the base's own,
    whatever is merged or in force. A convolution's `in` are its inputs at all places of the kernel.
    """
    factors, scaling = site.lora_branches[adapter], site.lora_arithmetic[adapter].scaling
    A, B = factors.product()
    blocks = site.lora_arithmetic[adapter].blocks
    A, B = (torch.block_diag(*t.flatten(1).chunk(n)) for t, n in zip((A, B), blocks, strict=True))
    wide = torch.promote_types(A.dtype, torch.float32)
    delta = scaling * (B.to(wide) @ A.to(wide))
    if factors.magnitude is None:
        return delta
    W = (oriented_weight(site) if weight is None else weight).to(A.device)
    gain = factors.magnitude.weight.flatten().to(wide) / row_norms(W, A, B, scaling)
    return torch.addcmul(gain[:, None] * delta, (gain - 1)[:, None], W.to(wide))


def oriented_weight(site: Site) -> Tensor:
    """Return the values of the base's weight as (out, in), wherever they are, and unpacked."""
    if packing_of(site) is not None:
        return unpacked(site)
    weight = copies.base_tensor(*site.lora_place)
    assert weight is not None
    values = values_of(*site.lora_place, weight)
    return values.t() if site.lora_turned else values.flatten(1)
