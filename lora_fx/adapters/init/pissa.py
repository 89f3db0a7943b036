"""`init = pissa`: the principal part of the weight, which keeps the rest."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place
from lora_fx.adapters.init.randomised import randomised_svd


def pissa(place: Place) -> tuple[Tensor, Tensor]:
    """Take A = √(Σᵣ/s) Vᵣᵀ and B = Uᵣ √(Σᵣ/s), so that s B A is the best W of rank r.

    W = U Σ Vᵀ. Meng et al. 2024, arXiv 2404.02948, §3, eq. 2 and 3. With `iterations` Uᵣ, Σᵣ and Vᵣ
    are those of a randomised SVD, §4. PEFT's `"pissa"` and `"pissa_niter_…"`.
    """
    W, rank, iterations = place.weight, place.rank, dict(place.init.arguments).get("iterations")
    if isinstance(iterations, int):
        U, S, V = randomised_svd(W, rank, iterations, place.generator)
    else:
        U, S, V = torch.linalg.svd(W, full_matrices=False)
    root = (S[:rank] / place.scaling).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root
