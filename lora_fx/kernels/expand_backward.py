"""`lora_fx::expand_backward`: both gradients of a low-rank product from one read of the output's.

    y = h Bᵀ     →     dh = dy B     dB = dyᵀ h          dy: (m, n)   B: (n, r)   h: (m, r)

The result is partial sums in float32, dh as (parts of n, m, r) and dB as (parts of m, n, r), whose
sums over the first dimension the graph takes, together with what comes after. No atomics: equal
inputs give equal bits. On a GPU a Triton kernel, elsewhere the plain reference below.
"""

import torch
from torch import Tensor

MAX_RANK = 32
COLUMNS = 256  # of dy, that one program goes down
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define(
    "expand_backward(Tensor dy, Tensor B, Tensor h) -> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)


def rows_of_a_part(n: int) -> int:
    """Return how many rows of dy one program goes over: about 128 programs at 8192 rows."""
    wanted = 64 * -(-n // COLUMNS)
    return max(256, 1 << (wanted - 1).bit_length())


def expand_backward_reference(dy: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial sums of `dy @ B` and `dy.T @ h`, each product in float32."""
    dy, B, h = dy.float(), B.float(), h.float()
    columns = zip(dy.split(COLUMNS, 1), B.split(COLUMNS), strict=True)
    rows = rows_of_a_part(B.shape[0])
    chunks = zip(dy.split(rows), h.split(rows), strict=True)
    return (
        torch.stack([part @ factor for part, factor in columns]),
        torch.stack([part.t() @ factor for part, factor in chunks]),
    )


def _on_gpu(dy: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    from lora_fx.kernels.expand_backward_triton import launch

    dh, dB = _shapes(dy, B, h)
    launch(dy, B, h, dh, dB, COLUMNS, rows_of_a_part(B.shape[0]))
    return dh, dB


def _shapes(dy: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    (m, n), r = dy.shape, B.shape[1]
    parts = -(-n // COLUMNS), -(-m // rows_of_a_part(n))
    return (
        dy.new_empty((parts[0], m, r), dtype=torch.float32),
        dy.new_empty((parts[1], n, r), dtype=torch.float32),
    )


_library.impl("expand_backward", expand_backward_reference, "CPU")
_library.impl("expand_backward", _on_gpu, "CUDA")
torch.library.register_fake("lora_fx::expand_backward", _shapes, lib=_library)

expand_backward = torch.ops.lora_fx.expand_backward.default
