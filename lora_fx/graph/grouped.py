"""Products of rows with the matrices of their groups: what experts compute.

    grouped(x, W, offsets)      row i of y is x_i W_e, with offsets[e - 1] <= i < offsets[e]

x: (S, m), rows of a group together   W: (E, m, n)   offsets: int32 (E,), where each group ends
Rows beyond the last group are zero. A group without rows costs nothing, and no gradient of W is
computed that nobody asked for: that of a whole stack is as large as the stack.

torch's own `grouped_mm` is a kernel for bfloat16 on a GPU, which wants rows of whole 16 bytes. It
is called in here, where its operands have the strides that they were given: Inductor 2.11 lays out
anew what it gives to `grouped_mm` itself, and may break that condition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 8  # elements of bfloat16 in 16 bytes


@torch.library.custom_op("lora_fx::grouped", mutates_args=())
def _grouped(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    if _is_whole(x, W):
        return F.grouped_mm(x, W, offs=offsets)
    y = x.new_zeros(x.shape[0], W.shape[2])
    for e, rows in _groups(offsets):
        torch.mm(x[rows], W[e], out=y[rows])
    return y


@_grouped.register_fake
def _(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[2])


@torch.library.custom_op("lora_fx::grouped_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, W: Tensor, offsets: Tensor, of_x: bool, of_W: bool
) -> tuple[Tensor, Tensor]:
    if _is_whole(x, W):
        dy, none = dy.contiguous(), x.new_empty(0)
        dx = F.grouped_mm(dy, W.mT, offs=offsets) if of_x else none
        return dx, F.grouped_mm(x.contiguous().t(), dy, offs=offsets) if of_W else none
    dx = torch.zeros_like(x) if of_x else x.new_empty(0)
    dW = torch.zeros(W.shape, dtype=W.dtype, device=W.device) if of_W else W.new_empty(0)
    for e, rows in _groups(offsets):
        if of_x:
            torch.mm(dy[rows], W[e].t(), out=dx[rows])
        if of_W:
            torch.mm(x[rows].t(), dy[rows], out=dW[e])
    return dx, dW


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, W: Tensor, offsets: Tensor, of_x: bool, of_W: bool
) -> tuple[Tensor, Tensor]:
    dW = W.new_empty(W.shape) if of_W else W.new_empty(0)
    return torch.empty_like(x) if of_x else x.new_empty(0), dW


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    of_x, of_W, _ = ctx.needs_input_grad
    dx, dW = _backward(dy, *ctx.saved_tensors, of_x, of_W)
    return dx if of_x else None, dW if of_W else None, None


_grouped.register_autograd(_differentiate, setup_context=_keep)

grouped = torch.ops.lora_fx.grouped.default


def _groups(offsets: Tensor) -> list[tuple[int, slice]]:
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return [
        (e, slice(start, end))
        for e, (start, end) in enumerate(zip(starts, ends, strict=True))
        if end > start
    ]


def is_fast(x: Tensor) -> bool:
    """Whether torch's own kernel multiplies these rows."""
    return x.is_cuda and x.dtype == torch.bfloat16


def missing(width: int) -> int:
    """Return how many columns a factor of this rank lacks for torch's kernel."""
    return -width % _ALIGNED


def _is_whole(x: Tensor, W: Tensor) -> bool:
    return is_fast(x) and not any(missing(width) for width in W.shape[1:])
