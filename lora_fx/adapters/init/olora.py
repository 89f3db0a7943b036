"""`init = olora`: the first directions of a QR factorisation, which the weight loses."""

import torch
from torch import Tensor

from lora_fx.adapters.init.place import Place


def olora(place: Place) -> tuple[Tensor, Tensor]:
    """Take B = Q[:, :r] and A = R[:r], where W = Q R. PEFT's `"olora"`.

    Büyükakyüz 2024, arXiv 2406.01775, §3. The weight loses s B A.
    """
    Q, R = torch.linalg.qr(place.weight)
    return R[: place.rank].contiguous(), Q[:, : place.rank].contiguous()
