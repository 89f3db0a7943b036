"""KaSA: an adapter with a diagonal between B and A, over the weight without its smallest part.

    W_res = Σ σᵢ uᵢ vᵢᵀ over all but the r smallest σ        y = W_res x + s B diag(d) A x

Wang et al. 2024, arXiv 2412.06071, §3.1, eq. 3 to 7. What is left out is kept as the start of a
change (`changed_weight.py`), so that the module is the base again without the adapter.
"""

import torch
from torch import Tensor

from lora_fx.adapters.init import is_without_values
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.changed_weight import change, original


def truncate(site: Site, adapter: str, device: torch.device | None = None) -> None:
    """Leave the smallest part out of a site's weight, of the rank of an adapter that is there.

    Computed on the device, if one is given.
    """
    removed = smallest(site, site.lora_branches[adapter].rank, device)
    change(site, adapter, None, removed, device)


@torch.no_grad()
def smallest(site: Site, rank: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return A₀ (r, in) and B₀ (out, r), whose product is the base's weight but for its best part.

    Without values they are zero. On the device that is given, else on the weight's.
    """
    if is_without_values(site):
        rows, columns = site.weight.shape
        return torch.zeros(rank, columns), torch.zeros(rows, rank)
    weight = original(site)
    wide = torch.promote_types(weight.dtype, torch.float32)
    U, S, V = torch.linalg.svd(weight.to(device or weight.device, wide), full_matrices=False)
    return V[-rank:].contiguous(), (U[:, -rank:] * S[-rank:]).contiguous()


def regularization(A: Tensor, B: Tensor, d: Tensor, beta: float, gamma: float) -> Tensor:
    """Return β ‖d‖² + γ (‖Bᵀ B − I‖ + ‖A Aᵀ − I‖), Frobenius norms, in float32 or wider.

    Wang et al. 2024, arXiv 2412.06071, §3.3, eq. 9 to 11.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    A, B, d = A.to(wide), B.to(wide), d.to(wide)
    one = torch.eye(len(d), dtype=wide, device=d.device)
    apart = torch.linalg.norm(B.t() @ B - one) + torch.linalg.norm(A @ A.t() - one)
    return beta * d.square().sum() + gamma * apart
