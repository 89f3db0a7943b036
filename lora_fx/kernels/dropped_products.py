"""Low-rank products of dropped inputs that are never written: what is kept, a seed says.

    dropped_shrink(x, A, seeds, p)       h   = [drop₀(x) A₀ᵀ, drop₁(x) A₁ᵀ, …]      (m, sites r)
    dropped_factors(dh, x, seeds, p)     dA  = [dh₀ᵀ drop₀(x); dh₁ᵀ drop₁(x); …]    (sites r, in)
    dropped_expand(dh, A, seeds, p)      dx  = Σᵢ dropᵢ(dhᵢ Aᵢ)                     (m, in)

x: (m, in)   A: (sites r, in), site after site   seeds: int64 (sites,)   dh as h

Each has a gradient, made of the other two: they are the three sides of one trilinear form. dropᵢ
sets elements to zero with probability p, for each site others, and multiplies what it keeps, as
`kernels/kept.py` says (Srivastava et al. 2014; Hu et al. 2021, arXiv 2106.09685, §4.1, with PEFT's
dropout before A). Products are of values in the dtype of x, with sums in float32, rounded once: h
and dx to the dtype of x; dA is float32. No atomics: equal inputs give equal bits. On a GPU Triton
kernels, which draw in registers and read x once for up to three sites, elsewhere the plain
references below.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_fx.kernels.kept import kept, stretch

MAX_RANK = 64
MOST_SITES = 6  # of one call: `dropped_expand` is unrolled over them
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define("dropped_shrink(Tensor x, Tensor A, Tensor seeds, float p) -> Tensor")
_library.define("dropped_factors(Tensor dh, Tensor x, Tensor seeds, float p) -> Tensor")
_library.define("dropped_expand(Tensor dh, Tensor A, Tensor seeds, float p) -> Tensor")


def shrink_reference(x: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return h, one site after another."""
    sites = zip(_masks(seeds, x.shape, p), A.to(x.dtype).float().chunk(len(seeds)), strict=True)
    h = [torch.where(mask, x, 0).float() @ factor.t() for mask, factor in sites]
    return (torch.cat(h, 1) * stretch(p)).to(x.dtype)


def factors_reference(dh: Tensor, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dA, one site after another."""
    sites = zip(_masks(seeds, x.shape, p), dh.float().chunk(len(seeds), 1), strict=True)
    dA = [own.t() @ torch.where(mask, x, 0).float() for mask, own in sites]
    return torch.cat(dA) * stretch(p)


def expand_reference(dh: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return dx, one site after another."""
    shape = torch.Size((len(dh), A.shape[1]))
    factors = A.to(dh.dtype).float().chunk(len(seeds))
    sites = zip(_masks(seeds, shape, p), dh.float().chunk(len(seeds), 1), factors, strict=True)
    total = torch.zeros(shape, device=dh.device)
    for mask, own, factor in sites:
        total += torch.where(mask, own @ factor, 0)
    return (total * stretch(p)).to(dh.dtype)


def _masks(seeds: Tensor, shape: torch.Size, p: float) -> Iterator[Tensor]:
    rows, columns = shape
    return (kept(seed, rows, columns, p) for seed in seeds)


def _shrink_on_gpu(x: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    from lora_fx.kernels.dropped_products_triton import shrink

    with torch.cuda.device_of(x):
        return shrink(x, A, seeds, p)


def _factors_on_gpu(dh: Tensor, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    from lora_fx.kernels.dropped_products_triton import factors

    with torch.cuda.device_of(x):
        return factors(dh, x, seeds, p)


def _expand_on_gpu(dh: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    from lora_fx.kernels.dropped_products_triton import expand

    with torch.cuda.device_of(A):
        return expand(dh, A, seeds, p)


def _shape_of_h(x: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    return x.new_empty((x.shape[0], A.shape[0]))


def _shape_of_factors(dh: Tensor, x: Tensor, seeds: Tensor, p: float) -> Tensor:
    return x.new_empty((dh.shape[1], x.shape[1]), dtype=torch.float32)


def _shape_of_dx(dh: Tensor, A: Tensor, seeds: Tensor, p: float) -> Tensor:
    return dh.new_empty((dh.shape[0], A.shape[1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _of_shrink(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    x, A, seeds = ctx.saved_tensors
    dx = dropped_expand(dh, A, seeds, ctx.p) if ctx.needs_input_grad[0] else None
    dA = dropped_factors(dh, x, seeds, ctx.p).to(A.dtype) if ctx.needs_input_grad[1] else None
    return dx, dA, None, None


def _of_factors(ctx: Any, ddA: Tensor) -> tuple[Tensor | None, ...]:
    dh, x, seeds = ctx.saved_tensors
    ddh = dropped_shrink(x, ddA, seeds, ctx.p) if ctx.needs_input_grad[0] else None
    dx = dropped_expand(dh, ddA, seeds, ctx.p) if ctx.needs_input_grad[1] else None
    return ddh, dx, None, None


def _of_expand(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dh, A, seeds = ctx.saved_tensors
    ddh = dropped_shrink(ddx, A, seeds, ctx.p) if ctx.needs_input_grad[0] else None
    dA = dropped_factors(dh, ddx, seeds, ctx.p).to(A.dtype) if ctx.needs_input_grad[1] else None
    return ddh, dA, None, None


for _name, _reference, _kernel, _shape, _gradients in (
    ("dropped_shrink", shrink_reference, _shrink_on_gpu, _shape_of_h, _of_shrink),
    ("dropped_factors", factors_reference, _factors_on_gpu, _shape_of_factors, _of_factors),
    ("dropped_expand", expand_reference, _expand_on_gpu, _shape_of_dx, _of_expand),
):
    _library.impl(_name, _reference, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"lora_fx::{_name}", _shape, lib=_library)
    torch.library.register_autograd(
        f"lora_fx::{_name}", _gradients, setup_context=_keep, lib=_library
    )

dropped_shrink = torch.ops.lora_fx.dropped_shrink.default
dropped_factors = torch.ops.lora_fx.dropped_factors.default
dropped_expand = torch.ops.lora_fx.dropped_expand.default
