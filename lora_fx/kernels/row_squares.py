"""`lora_fx::row_squares`: the squares in the rows of W + s B A, summed in one read of W.

    ‖w + s b A‖² = Σ over parts of the columns      w: a row of W, b: the same row of B

W: (out, in)   A: (r, in)   B: (out, r)   s: ()     →     float32 (parts, out)

The graph takes the sum over the parts and its root. W + s B A is made tile by tile and never
written; W in its own dtype, bfloat16 or float16, to which A is rounded, s B to some 16 bits; sums
are in float32. No atomics: equal inputs give equal bits. On a GPU a Triton kernel, elsewhere the
plain reference below, which does write it.
"""

import torch
from torch import Tensor

MAX_RANK = 64
ROWS = 64  # of a tile: the least that a warpgroup's matrix instruction takes
_PROGRAMS = 512  # some four for each multiprocessor of an H100
_LEAST = 512  # columns of a part
_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define("row_squares(Tensor W, Tensor A, Tensor B, Tensor scaling) -> Tensor")


def columns_of_a_part(out: int, columns: int) -> int:
    """Return how many columns of W one program goes over."""
    parts = max(1, _PROGRAMS // -(-out // ROWS))
    return max(_LEAST, 1 << (-(-columns // parts) - 1).bit_length())


def row_squares_reference(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
    """Return the partial sums, of W + s B A in float32."""
    square = (W.float() + (B.float() * scaling) @ A.to(W.dtype).float()).square()
    parts = square.split(columns_of_a_part(*W.shape), 1)
    return torch.stack([part.sum(1) for part in parts])


def _on_gpu(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
    from lora_fx.kernels.row_squares_triton import launch

    partial = _shape(W, A, B, scaling)
    with torch.cuda.device_of(W):
        launch(W, A, B, scaling, partial, columns_of_a_part(*W.shape))
    return partial


def _shape(W: Tensor, A: Tensor, B: Tensor, scaling: Tensor) -> Tensor:
    out, columns = W.shape
    parts = -(-columns // columns_of_a_part(out, columns))
    return W.new_empty((parts, out), dtype=torch.float32)


_library.impl("row_squares", row_squares_reference, "CPU")
_library.impl("row_squares", _on_gpu, "CUDA")
torch.library.register_fake("lora_fx::row_squares", _shape, lib=_library)

row_squares = torch.ops.lora_fx.row_squares.default
