"""A low-rank product for each sample of a batch with the factors of its own adapters, in place.

    picked_shrink(x, A, which, rank, part, d)        h_st = x_s A_jᵀ             j = which[s, t]
    picked_expand(y, h, B, which, shares, scalings, d)
                                                     z_s = y_s + Σₜ (c_st f_j h_st) B_jᵀ

x: (S, T, in)   A: (rⱼ, in) each   which: int64 (S, k), -1 for none   shares c: float32 (S, k)
y: (S, T, out)  B: (out, rⱼ) each  scalings f: float32, one for each factor
h: float32 (parts of in, S, T, k rank): its sum over the first dimension is the product

Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3. The last of A and of B may be many factors in one
tensor, (N, r, in) and (N, out, r). Factors are read where they lie, and only those that a sample
has: nothing is copied, and other adapters take no time. There are no gradients.

Products are of values in dtype d, with sums in float32. A sample without adapters is what it was,
bit for bit. No atomics: equal inputs give equal bits. On a GPU Triton kernels, elsewhere the plain
references below.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_RANK = 64
MOST_SINGLE = 8  # factors in tensors of their own, among which a kernel chooses
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "picked_shrink(Tensor x, Tensor[] A, Tensor which, int rank, int part, ScalarType dtype) "
    "-> Tensor"
)
_library.define(
    "picked_expand(Tensor y, Tensor h, Tensor[] B, Tensor which, Tensor shares, Tensor scalings, "
    "ScalarType dtype) -> Tensor"
)


def shrink_reference(
    x: Tensor, A: Sequence[Tensor], which: Tensor, rank: int, part: int, dtype: torch.dtype
) -> Tensor:
    """Return the partial sums, one sample and term after another."""
    h = _partial(x, A, which, rank, part, dtype).zero_()
    for s, t, factor in _picked(A, which):
        values, own = x[s].to(dtype).float(), factor.to(dtype).float()
        some = zip(values.split(part, 1), own.split(part, 1), strict=True)
        products = torch.stack([a @ b.T for a, b in some])
        h[:, s, :, t * rank : t * rank + len(factor)] = products
    return h


def expand_reference(
    y: Tensor,
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the sums, one sample and term after another."""
    z = y.float() if y.dtype != torch.float32 else y.clone()
    whole, rank = h.sum(0), h.shape[-1] // which.shape[1]
    for s, t, factor in _picked(B, which):
        own = whole[s, :, t * rank : t * rank + factor.shape[1]]
        own = own * (shares[s, t] * scalings[which[s, t]])
        z[s] += own.to(dtype).float() @ factor.to(dtype).float().T
    return z.to(y.dtype).contiguous()


def _picked(factors: Sequence[Tensor], which: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield sample, term and factor, where there is one."""
    each = [one for some in factors for one in (some if some.dim() == 3 else [some])]
    for s, row in enumerate(which.tolist()):
        yield from ((s, t, each[j]) for t, j in enumerate(row) if j >= 0)


def _shrink_on_gpu(
    x: Tensor, A: Sequence[Tensor], which: Tensor, rank: int, part: int, dtype: torch.dtype
) -> Tensor:
    from lora_fx.kernels.picked_products_triton import shrink

    h = _partial(x, A, which, rank, part, dtype)
    shrink(x, A, which, h, rank, part, dtype)
    return h


def _expand_on_gpu(
    y: Tensor,
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    from lora_fx.kernels.picked_products_triton import expand

    z = y.new_empty(y.shape)
    expand(y, h, B, which, shares, scalings, z, dtype)
    return z


def _partial(
    x: Tensor, A: Sequence[Tensor], which: Tensor, rank: int, part: int, dtype: torch.dtype
) -> Tensor:
    S, T, n = x.shape
    shape = (-(-n // part), S, T, which.shape[1] * rank)
    return x.new_empty(shape, dtype=torch.float32)


def _sum(y: Tensor, *_: object) -> Tensor:
    return y.new_empty(y.shape)


_library.impl("picked_shrink", shrink_reference, "CPU")
_library.impl("picked_shrink", _shrink_on_gpu, "CUDA")
torch.library.register_fake("lora_fx::picked_shrink", _partial, lib=_library)
_library.impl("picked_expand", expand_reference, "CPU")
_library.impl("picked_expand", _expand_on_gpu, "CUDA")
torch.library.register_fake("lora_fx::picked_expand", _sum, lib=_library)

picked_shrink = torch.ops.lora_fx.picked_shrink.default
picked_expand = torch.ops.lora_fx.picked_expand.default
