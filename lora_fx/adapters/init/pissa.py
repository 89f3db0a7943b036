"""`init = pissa`: the principal part of the weight, which keeps the rest."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place


def pissa(place: Place) -> tuple[Tensor, Tensor]:
    """Take A = √(Σᵣ/s) Vᵣᵀ and B = Uᵣ √(Σᵣ/s), so that s B A is the best W of rank r.

    W = U Σ Vᵀ. Meng et al. 2024, arXiv 2404.02948, §3, eq. 2 and 3. With `iterations` Uᵣ, Σᵣ and Vᵣ
    are those of a randomised SVD, §4. PEFT's `"pissa"` and `"pissa_niter_…"`.
    """
    arguments = dict(place.init.arguments)
    if "iterations" in arguments:
        U, S, V = _randomised(place, int(arguments["iterations"]))  # type: ignore[arg-type]
    else:
        U, S, V = torch.linalg.svd(place.weight, full_matrices=False)
    root = (S[: place.rank] / place.scaling).sqrt()
    return root[:, None] * V[: place.rank], U[:, : place.rank] * root


def _randomised(place: Place, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of W in the space that some steps of subspace iteration find.

    Halko et al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    W = place.weight
    start = torch.randn(W.shape[1], place.rank, generator=place.generator)
    Q, _ = torch.linalg.qr(W @ start.to(W))
    for _ in range(iterations):
        Q, _ = torch.linalg.qr(W.T @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    U, S, V = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, V
