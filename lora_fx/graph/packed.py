"""Operators on a weight W (out, in) in 4 or 8 bits, of which a few rows are unpacked at a time.

    packed_rows(tensors, A, packing)       norms of W's rows (out,), and W Aᵀ (out, r)
    packed_linear(x, tensors, packing)     x Wᵀ; W has no gradient

x: (*, in)   A: (r, in). Their `tensors` and `packing` are those of `graph/packing.py`. Nothing is
kept for the backward pass but the packed weight, which is unpacked again there.
"""

from typing import Any

import torch
from torch import Tensor

from lora_fx.graph.packing import Packing


@torch.library.custom_op("lora_fx::packed_rows", mutates_args=())
def _rows(tensors: list[Tensor], A: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    how, wide = Packing.parse(packing), torch.promote_types(A.dtype, torch.float32)
    own, inner = _empty_rows(A, how, wide)
    for part, W in how.rows(tensors):
        own[part] = torch.linalg.vector_norm(W, dim=1, dtype=wide)
        inner[part] = torch.mm(W, A.to(W.dtype).t())
    return own, inner


@_rows.register_fake
def _(tensors: list[Tensor], A: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    return _empty_rows(A, Packing.parse(packing), torch.promote_types(A.dtype, torch.float32))


def _empty_rows(A: Tensor, how: Packing, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = how.shape[0]
    return A.new_empty(rows, dtype=wide), A.new_empty(rows, A.shape[0], dtype=wide)


@torch.library.custom_op("lora_fx::packed_linear", mutates_args=())
def _linear(x: Tensor, tensors: list[Tensor], packing: str) -> Tensor:
    how = Packing.parse(packing)
    y = x.new_empty(*x.shape[:-1], how.shape[0])
    for part, W in how.rows(tensors):
        y[..., part] = torch.matmul(x, W.to(x.dtype).t())
    return y


@_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], packing: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], Packing.parse(packing).shape[0])


@torch.library.custom_op("lora_fx::packed_linear_backward", mutates_args=())
def _backward(dy: Tensor, tensors: list[Tensor], packing: str) -> Tensor:
    how = Packing.parse(packing)
    dx = dy.new_zeros(*dy.shape[:-1], how.shape[1])
    for part, W in how.rows(tensors):
        dx += torch.matmul(dy[..., part], W.to(dy.dtype))
    return dx


@_backward.register_fake
def _(dy: Tensor, tensors: list[Tensor], packing: str) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], Packing.parse(packing).shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: Tensor) -> None:
    _, tensors, ctx.packing = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, list[None], None]:
    tensors = list(ctx.saved_tensors)
    dx = _backward(dy, tensors, ctx.packing) if ctx.needs_input_grad[0] else None
    return dx, [None] * len(tensors), None


_linear.register_autograd(_differentiate, setup_context=_keep)

packed_rows = torch.ops.lora_fx.packed_rows.default
packed_linear = torch.ops.lora_fx.packed_linear.default
