"""Low-rank products added to many weights at once, on a GPU.

    W'ᵢ = Wᵢ + Σⱼ sᵢⱼ Pᵢⱼ Qᵢⱼ          W, W': (m, n)   P: (m, r)   Q: (r, n)

Added in float32, to rounding, and rounded once to the dtype of W. Each W is read once and each W'
written once, in one launch for all that have the same dtypes, whatever their shapes and ranks: a
model has hundreds of weights, and a launch for each takes the host longer than the GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEVICE = "cuda"
_MOST_RANKS = 64  # of a weight's products together
_PLAIN = (Tensor, nn.Parameter)  # what is sharded is not in memory as it seems
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Product(NamedTuple):
    """What is added to a weight: s P Q."""

    P: Tensor
    Q: Tensor
    scaling: float


class Sum(NamedTuple):
    """A weight, and what is added to it."""

    weight: Tensor
    products: Sequence[Product]


def is_in_kernel(of: Sum) -> bool:
    """Return whether `merged_weights` computes this."""
    weight = of.weight
    tensors = (weight, *(tensor for P, Q, _ in of.products for tensor in (P, Q)))
    if not all(type(tensor) in _PLAIN for tensor in tensors):
        return False
    if weight.device.type != DEVICE or weight.dtype not in _DTYPES or weight.stride(1) != 1:
        return False
    ranks, kinds, device = 0, set(), weight.device
    for P, Q, _ in of.products:
        if P.device != device or Q.device != device:
            return False
        kinds.add((P.dtype, Q.dtype))
        ranks += Q.shape[0]
    (kind,) = kinds if len(kinds) == 1 else (None,)
    known = kind is not None and kind[0] in _DTYPES and kind[1] in _DTYPES
    return known and ranks <= _MOST_RANKS and weight.numel() > 0


def merged_weights(sums: Sequence[Sum], into: Sequence[Tensor]) -> None:
    """Write each sum into a tensor of the weight's shape and dtype, whose columns lie side by side.

    All are `is_in_kernel`.
    """
    from lora_fx.kernels.merged_weights_triton import launch

    alike: dict[tuple[Any, ...], list[tuple[Sum, Tensor]]] = {}
    for of, result in zip(sums, into, strict=True):
        P, Q, _ = of.products[0]
        kind = of.weight.device, of.weight.dtype, P.dtype, Q.dtype, len(of.products)
        alike.setdefault(kind, []).append((of, result))
    for (device, *_), pairs in alike.items():
        with torch.accelerator.device_index(device.index):
            launch(pairs)
