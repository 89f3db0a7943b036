"""Low-rank products for each sample of a batch with the factors of its own adapters.

    picked_shrink(x, A, sites, which, rank, part, d)     h_ist = x_s A_ijᵀ           j = which[s, t]
    picked_expand(y, h, B, which, shares, f, d, gate)    z_is = y_is + Σₜ (c_st f_ij h_ist) B_ijᵀ

at some sites i that have one input x and the same adapters j. With a `gate`, of two sites, the
result is gate(z_0) z_1, as a gated MLP's activation makes it.

x: (S, T, in)    A: (rⱼ, in) each    which: int64 (S, k), -1 for none    shares c: float32 (S, k)
yᵢ: (S, T, outᵢ) B: (outᵢ, rⱼ) each  fᵢ: float32, scalings, one for each adapter
h: float32 (sites, parts of in, S, T, k rank): its sum over dimension 1 is the product

Hu et al. 2021, arXiv 2106.09685, §4.1, eq. 3. A and B are listed site by site; the last of a site
may be many factors in one tensor, (N, r, in) and (N, outᵢ, r). Factors are read where they lie, and
only those that a sample has: nothing is copied, and other adapters take no time. There are no
gradients. `which` and B are not computed between the two.

Products are of values in dtype d, with sums in float32, rounded once, to the dtype of y; a gate is
computed of those in float32 and rounded at its end, as Inductor does it. A sample without adapters
is what it was, bit for bit. No atomics: equal inputs give equal bits. On a GPU Triton kernels,
elsewhere the plain references below.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_RANK = 64
MOST_SINGLE = 8  # factors in tensors of their own, among which a kernel chooses
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "picked_shrink(Tensor x, Tensor[] A, int sites, Tensor which, int rank, int part, "
    "ScalarType dtype) -> Tensor"
)
_library.define(
    "picked_expand(Tensor[] y, Tensor h, Tensor[] B, Tensor which, Tensor shares, "
    "Tensor[] scalings, ScalarType dtype, str gate) -> Tensor[]"
)


def shrink_reference(
    x: Tensor,
    A: Sequence[Tensor],
    sites: int,
    which: Tensor,
    rank: int,
    part: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the partial sums, one site, sample and term after another."""
    h = _partial(x, A, sites, which, rank, part, dtype).zero_()
    for i, s, t, factor in _picked(A, sites, which):
        values, own = x[s].to(dtype).float(), factor.to(dtype).float()
        some = zip(values.split(part, 1), own.split(part, 1), strict=True)
        products = torch.stack([a @ b.T for a, b in some])
        h[i, :, s, :, t * rank : t * rank + len(factor)] = products
    return h


def expand_reference(
    y: Sequence[Tensor],
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Sequence[Tensor],
    dtype: torch.dtype,
    gate: str,
) -> list[Tensor]:
    """Return the sums, one site, sample and term after another."""
    z = [one.to(torch.float32, copy=True) for one in y]
    whole, rank = h.sum(1), h.shape[-1] // which.shape[1]
    for i, s, t, factor in _picked(B, len(y), which):
        own = whole[i, s, :, t * rank : t * rank + factor.shape[1]]
        own = own * (shares[s, t] * scalings[i][which[s, t]])
        z[i][s] += own.to(dtype).float() @ factor.to(dtype).float().T
    sums = [one.to(y[0].dtype).contiguous() for one in z]
    if gate:
        return [(GATES[gate](sums[0].float()) * sums[1].float()).to(y[0].dtype)]
    return sums


def _picked(
    factors: Sequence[Tensor], sites: int, which: Tensor
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield site, sample, term and factor, where there is one."""
    count, rows = len(factors) // sites, which.tolist()
    for i in range(sites):
        of_site = factors[i * count : (i + 1) * count]
        each = [one for some in of_site for one in (some if some.dim() == 3 else [some])]
        for s, row in enumerate(rows):
            yield from ((i, s, t, each[j]) for t, j in enumerate(row) if j >= 0)


def _shrink_on_gpu(
    x: Tensor,
    A: Sequence[Tensor],
    sites: int,
    which: Tensor,
    rank: int,
    part: int,
    dtype: torch.dtype,
) -> Tensor:
    from lora_fx.kernels.picked_products_triton import shrink

    h = _partial(x, A, sites, which, rank, part, dtype)
    with torch.cuda.device_of(x):
        shrink(x, A, which, h, rank, part, dtype)
    return h


def _expand_on_gpu(
    y: Sequence[Tensor],
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Sequence[Tensor],
    dtype: torch.dtype,
    gate: str,
) -> list[Tensor]:
    from lora_fx.kernels.picked_products_triton import expand

    z = _sums(y, h, B, which, shares, scalings, dtype, gate)
    with torch.cuda.device_of(h):
        expand(y, h, B, which, shares, scalings, z, dtype, gate)
    return z


def _partial(
    x: Tensor,
    A: Sequence[Tensor],
    sites: int,
    which: Tensor,
    rank: int,
    part: int,
    dtype: torch.dtype,
) -> Tensor:
    S, T, n = x.shape
    shape = (sites, -(-n // part), S, T, which.shape[1] * rank)
    return x.new_empty(shape, dtype=torch.float32)


def _sums(
    y: Sequence[Tensor],
    h: Tensor,
    B: Sequence[Tensor],
    which: Tensor,
    shares: Tensor,
    scalings: Sequence[Tensor],
    dtype: torch.dtype,
    gate: str,
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in (y[:1] if gate else y)]


def _refuse(ctx: object, *gradients: object) -> None:
    raise RuntimeError("a bug in lora_fx: picked products are for calls without gradients")


_library.impl("picked_shrink", shrink_reference, "CPU")
_library.impl("picked_shrink", _shrink_on_gpu, "CUDA")
torch.library.register_fake("lora_fx::picked_shrink", _partial, lib=_library)
_library.impl("picked_expand", expand_reference, "CPU")
_library.impl("picked_expand", _expand_on_gpu, "CUDA")
torch.library.register_fake("lora_fx::picked_expand", _sums, lib=_library)
torch.library.register_autograd("lora_fx::picked_shrink", _refuse, lib=_library)
torch.library.register_autograd("lora_fx::picked_expand", _refuse, lib=_library)

picked_shrink = torch.ops.lora_fx.picked_shrink.default
picked_expand = torch.ops.lora_fx.picked_expand.default
