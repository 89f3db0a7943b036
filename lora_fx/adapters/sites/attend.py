"""What `nn.MultiheadAttention` computes between its projections, and which masks it takes."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """What hides keys, as torch's attention is told it.

    `keys` (N, S) and `pairs` (L, S) or (N H, L, S) hide where they are True, or are added to the
    scores. `causal` says that `pairs` is the mask of a causal attention.
    """

    keys: Tensor | None
    pairs: Tensor | None
    causal: bool

    def checked(self, N: int, H: int, L: int, S: int) -> "Masks":
        """Return the masks. Raises RuntimeError, as torch does, for shapes that do not fit."""
        if self.causal and self.pairs is None:
            raise RuntimeError("`is_causal` is about an `attn_mask`, and none is given")
        if self.keys is not None and not _has_shape(self.keys, N, S):
            shape = tuple(self.keys.shape)
            raise RuntimeError(f"`key_padding_mask` is {shape}, and ({N}, {S}) is needed")
        if self.pairs is not None and not (
            _has_shape(self.pairs, L, S) or _has_shape(self.pairs, N * H, L, S)
        ):
            shape = tuple(self.pairs.shape)
            needed = f"({L}, {S}) or ({N * H}, {L}, {S})"
            raise RuntimeError(f"`attn_mask` is {shape}, and {needed} is needed")
        return self

    def added(self, q: Tensor, more: int) -> Tensor | None:
        """Return what is added to the scores (N, H, L, S + more) of q (N, H, L, D), or None."""
        N, H, *_ = q.shape
        total = None
        if self.pairs is not None:
            pairs = F.pad(_floating(self.pairs, q.dtype), (0, more))
            total = pairs if pairs.dim() == 2 else pairs.unflatten(0, (N, H))
        if self.keys is not None:
            keys = F.pad(_floating(self.keys, q.dtype), (0, more))[:, None, None]
            total = keys if total is None else total + keys
        return total


def _has_shape(mask: Tensor, *sizes: int) -> bool:
    """Compare sizes one by one: they may be symbols."""
    return mask.dim() == len(sizes) and all(mask.shape[i] == n for i, n in enumerate(sizes))


def _floating(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise RuntimeError(f"a mask of dtype {mask.dtype} is neither of bool nor of floats")
    return mask.to(dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, dropout: float, more: int, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(q kᵀ / √D + mask) v (N, H, L, D), and the softmax (N, H, L, S) if needed.

    q: (N, H, L, D), k and v: (N, H, S, D), of which the last `more` keys are hidden by no mask.
    Vaswani et al. 2017, arXiv 1706.03762, eq. 1. As in torch, a causal mask alone is given to the
    kernel as such, and the softmax that is returned is that after dropout.
    """
    if not need_weights:
        causal = masks.causal and masks.keys is None
        mask = None if causal else masks.added(q, more)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
    mask = masks.added(q, more)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v, weights
