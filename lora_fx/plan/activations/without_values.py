"""Run a forward on meta tensors as it would run on real ones, as far as values decide nothing.

Attention is counted as a fused kernel computes it: it keeps q, k, v, the output and one number per
row (Dao 2023, FlashAttention-2, arXiv 2307.08691, §3.1.2), not the matrix of scores.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_unfused_attention = F.scaled_dot_product_attention


class WithoutValues(TorchFunctionMode):
    """Stand in for what has no kernel on meta tensors, or another one than on a device.

    A question about values is answered as for a batch without padding: a condition holds, and no
    given token is among the inputs.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the stand-in of a function, or the function itself."""
        tensor = args[0] if args else None
        if func in _ANSWERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return _ANSWERS[func]
        return _STAND_INS.get(func, func)(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """q, k: (S, H, T, D)  v: (S, H, T, E)  ->  (S, H, T, E), laid out in memory as q is."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = torch.empty_like(q[..., :1].expand(*q.shape[:-1], v.shape[-1]))
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class _GroupedProduct(torch.autograd.Function):
    """x: (N, I)  w: (G, I, O)  ends: (G)  ->  (N, O); each row meets the matrix of its group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        x_has_gradient, w_has_gradient, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if w_has_gradient else None, w if x_has_gradient else None, ends)
        return x.new_empty(*x.shape[:-1], w.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """Count as fused what fused kernels take: as many heads of keys as of queries, or `gqa`."""
    if not enable_gqa and not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return _unfused_attention(query, key, value, attn_mask, *rest, **options)
    return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[return-value]


def _grouped_product(mat_a: Tensor, mat_b: Tensor, offs: Tensor, **_: Any) -> Tensor:
    return _GroupedProduct.apply(mat_a, mat_b, offs)  # type: ignore[return-value]


_STAND_INS: dict[Any, Callable[..., Any]] = {
    _unfused_attention: _attention,
    torch._grouped_mm: _grouped_product,  # type: ignore[attr-defined]
}
_ANSWERS: dict[Any, bool] = {Tensor.__bool__: True, Tensor.__contains__: False}
