"""`init = mica`: B the smallest left singular vectors of the weight, which stay; A zero."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place


def mica(place: Place) -> tuple[Tensor, Tensor]:
    """Take B (out, r) = the last r columns of U, where W = U S Vᵀ, and A = 0. PEFT's `"mica"`.

    Minor Component Adaptation, arXiv 2604.01694. B is not trained.
    """
    U, _, _ = torch.linalg.svd(place.weight, full_matrices=False)
    return U.new_zeros(place.rank, place.weight.shape[1]), U[:, -place.rank :].contiguous()
