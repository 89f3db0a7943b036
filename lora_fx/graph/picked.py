"""Factors picked for each sample of a mixed batch, out of those of many adapters.

    pick(factors, which, rank, False)      (S, k rank, n), of factors (rᵢ, n)
    pick(factors, which, rank, True)       (S, n, k rank), of factors (n, rᵢ)

which: int64 (S, k), the places of a sample's k factors in the list, or -1: there it gets zeros

Every factor is filled up with zeros to `rank`, the widest. What is in a factor that no sample has,
NaN included, reaches none; its gradient is zero. On a CPU it is not read either, so that the time
does not grow with their number. On a GPU the host does not know the places, and

    picked_on_device(factors, which, rank, columns, dtype)

puts all beside each other, in the dtype of the products, and takes rows of that: operators that a
compiler joins with what comes before and after. Gradients are added up in one order, whatever the
run: equal inputs give equal bits.
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


@torch.library.register_fake("lora_fx::pick_backward")
def _(
    dpicked: Tensor, which: Tensor, rank: int, columns: bool, ranks: list[int], wanted: list[int]
) -> list[Tensor]:
    return [dpicked.new_empty(_factor_shape(dpicked, ranks[i], columns)) for i in wanted]


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


class _OnDevice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, which: Tensor, rank: int, columns: bool, dtype: torch.dtype, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(which)
        ctx.ranks = [factor.shape[1 if columns else 0] for factor in factors]
        ctx.rank, ctx.columns, ctx.dtype = rank, columns, factors[0].dtype
        wide = [_widened(factor.to(dtype), rank, columns) for factor in factors]
        picked = torch.cat(wide).view(len(wide), *wide[0].shape)[which.clamp(0)]  # (S, k, ·, ·)
        picked = picked.masked_fill((which < 0)[..., None, None], 0)
        shape, _ = _shape(factors, which, rank, columns)
        return (picked.transpose(1, 2) if columns else picked).reshape(shape)

    @staticmethod
    def backward(ctx, dpicked: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (which,) = ctx.saved_tensors
        (S, k), rank = which.shape, ctx.rank
        if ctx.columns:
            own = dpicked.view(S, -1, k, rank).transpose(1, 2)
        else:
            own = dpicked.view(S, k, rank, -1)
        place = torch.where(which < 0, len(ctx.ranks), which).flatten()
        total = _added(own.flatten(0, 1).to(ctx.dtype), place, len(ctx.ranks) + 1)
        dim = 1 if ctx.columns else 0
        given = enumerate(zip(ctx.ranks, ctx.needs_input_grad[4:], strict=True))
        found = (total[i].narrow(dim, 0, r) if wanted else None for i, (r, wanted) in given)
        return None, None, None, None, *found


def picked_on_device(
    factors: Sequence[Tensor], which: Tensor, rank: int, columns: bool, dtype: torch.dtype
) -> Tensor:
    """Pick without knowing on the host what, in a dtype: see above."""
    return _OnDevice.apply(which, rank, columns, dtype, *factors)


@torch.library.custom_op("lora_fx::added", mutates_args=())
def _added(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Add up the values (n, …) that have one place: (count, …). `index_put_` sorts, on a GPU."""
    total = values.new_zeros(count, *values.shape[1:])
    return total.index_put_((place,), values, accumulate=True)


@torch.library.register_fake("lora_fx::added")
def _(values: Tensor, place: Tensor, count: int) -> Tensor:
    return values.new_empty(count, *values.shape[1:])


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
