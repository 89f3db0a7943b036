"""Factors picked for each sample of a mixed batch, out of those of many adapters.

    pick(factors, which, rank, False)      (S, k rank, n), of factors (rᵢ, n)
    pick(factors, which, rank, True)       (S, n, k rank), of factors (n, rᵢ)

which: int64 (S, k), the places of a sample's k factors in the list, or -1: there it gets zeros

Every factor is filled up with zeros to `rank`, the widest. A factor that no sample has is not read,
so that nothing in it, NaN included, reaches any sample, and the time does not grow with their
number; but on a GPU, where the places are not known to the host and all are stacked first. Its
gradient is zero.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("lora_fx::pick", mutates_args=(), device_types="cpu")
def _pick(factors: Sequence[Tensor], which: Tensor, rank: int, columns: bool) -> Tensor:
    shape, dim = _shape(factors, which, rank, columns)
    picked = factors[0].new_zeros(shape)
    for place, i in _places(which):
        own = _slot(picked, place, rank, dim)
        own.narrow(dim - 1, 0, factors[i].shape[dim - 1]).copy_(factors[i])
    return picked


def stacked(factors: Sequence[Tensor], which: Tensor, rank: int, columns: bool) -> Tensor:
    """Pick without knowing on the host what; this is the plain reference too."""
    shape, _ = _shape(factors, which, rank, columns)
    wide = [_widened(factor, rank, columns) for factor in factors]
    picked = torch.stack(wide)[which.clamp(0)]  # (S, k, ·, ·)
    picked = picked.masked_fill((which < 0)[..., None, None], 0)
    return (picked.transpose(1, 2) if columns else picked).reshape(shape)


@torch.library.register_fake("lora_fx::pick")
def _(factors: Sequence[Tensor], which: Tensor, rank: int, columns: bool) -> Tensor:
    return factors[0].new_empty(_shape(factors, which, rank, columns)[0])


@torch.library.custom_op("lora_fx::pick_backward", mutates_args=(), device_types="cpu")
def _backward(
    dpicked: Tensor, which: Tensor, rank: int, columns: bool, ranks: list[int], wanted: list[int]
) -> list[Tensor]:
    dim = 2 if columns else 1
    shapes = {i: _factor_shape(dpicked, ranks[i], columns) for i in wanted}
    found = {i: dpicked.new_zeros(shape) for i, shape in shapes.items()}
    for place, i in _places(which):
        if i in found:
            found[i] += _slot(dpicked, place, rank, dim).narrow(dim - 1, 0, ranks[i])
    return list(found.values())


def stacked_backward(
    dpicked: Tensor, which: Tensor, rank: int, columns: bool, ranks: list[int], wanted: list[int]
) -> list[Tensor]:
    """Return the gradients of the `wanted` factors without knowing on the host what was picked."""
    S, k = which.shape
    n = dpicked.shape[1 if columns else 2]
    slots = dpicked.view(S, n, k, rank).transpose(1, 2) if columns else dpicked.view(S, k, rank, n)
    slots = slots.flatten(0, 1)
    total = slots.new_zeros(len(ranks) + 1, *slots.shape[1:])  # the last is of no factor
    place = torch.where(which < 0, len(ranks), which).flatten()
    total.index_add_(0, place, slots)
    dim = 1 if columns else 0
    return [total[i].narrow(dim, 0, ranks[i]).clone() for i in wanted]


@torch.library.register_fake("lora_fx::pick_backward")
def _(
    dpicked: Tensor, which: Tensor, rank: int, columns: bool, ranks: list[int], wanted: list[int]
) -> list[Tensor]:
    return [dpicked.new_empty(_factor_shape(dpicked, ranks[i], columns)) for i in wanted]


_pick.register_kernel("cuda")(stacked)
_backward.register_kernel("cuda")(stacked_backward)


def _keep(ctx, inputs: tuple[Sequence[Tensor], Tensor, int, bool], output: Tensor) -> None:
    factors, which, ctx.rank, ctx.columns = inputs
    ctx.ranks = [factor.shape[1 if ctx.columns else 0] for factor in factors]
    ctx.wanted = [i for i, factor in enumerate(factors) if factor.requires_grad]
    ctx.save_for_backward(which)


def _differentiate(ctx, dpicked: Tensor) -> tuple[list[Tensor | None], None, None, None]:
    (which,) = ctx.saved_tensors
    how = which, ctx.rank, ctx.columns, ctx.ranks, ctx.wanted
    found = dict(zip(ctx.wanted, _backward(dpicked.contiguous(), *how), strict=True))
    return [found.get(i) for i in range(len(ctx.ranks))], None, None, None


_pick.register_autograd(_differentiate, setup_context=_keep)

pick = torch.ops.lora_fx.pick.default


def _shape(
    factors: Sequence[Tensor], which: Tensor, rank: int, columns: bool
) -> tuple[tuple[int, int, int], int]:
    """Return the shape of what is picked, and which of its dimensions is the rank's."""
    S, k = which.shape
    n = factors[0].shape[0 if columns else 1]
    return ((S, n, k * rank), 2) if columns else ((S, k * rank, n), 1)


def _factor_shape(picked: Tensor, rank: int, columns: bool) -> tuple[int, int]:
    return (picked.shape[1], rank) if columns else (rank, picked.shape[2])


def _places(which: Tensor) -> list[tuple[tuple[int, int], int]]:
    """Return (sample, term) and the factor there, where there is one."""
    rows = enumerate(which.tolist())
    return [((s, t), i) for s, row in rows for t, i in enumerate(row) if i >= 0]


def _slot(picked: Tensor, place: tuple[int, int], rank: int, dim: int) -> Tensor:
    """Return what a sample has of one term."""
    sample, term = place
    return picked[sample].narrow(dim - 1, term * rank, rank)


def _widened(factor: Tensor, rank: int, columns: bool) -> Tensor:
    lacks = rank - factor.shape[1 if columns else 0]
    return F.pad(factor, (0, lacks) if columns else (0, 0, 0, lacks))
