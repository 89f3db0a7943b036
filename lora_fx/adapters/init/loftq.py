"""`init = loftq`: a quantised weight, and the adapter that makes up for what it loses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.init.place import Place

# Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, appendix E: NormalFloat of 4 bits
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BLOCK = 64


def loftq(place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and Q, a weight whose values are those of 4 or 8 bits.

        Q = quantised(W − s B A),   s B A = the best W − Q of rank r

    by turns, `iterations` times, beginning with B A = 0. Li et al. 2023, arXiv 2310.08659,
    algorithm 1. PEFT's `"loftq"` leaves out s, which is right where s = 1.
    """
    arguments = dict(place.init.arguments)
    quantised = _nf4 if arguments["bits"] == 4 else _int8
    W, near, iterations = place.weight, place.weight, arguments["iterations"]
    assert isinstance(iterations, int)
    for _ in range(iterations):
        Q = quantised(near)
        U, S, V = torch.linalg.svd(W - Q, full_matrices=False)
        root = (S[: place.rank] / place.scaling).sqrt()
        A, B = root[:, None] * V[: place.rank], U[:, : place.rank] * root
        near = W - place.scaling * (B @ A)
    return A, B, Q  # type: ignore[possibly-undefined]


def _nf4(weight: Tensor) -> Tensor:
    """Round each block of 64 elements to the sixteen values of NF4 times its largest magnitude."""
    levels = weight.new_tensor(_NF4)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % _BLOCK)).view(-1, _BLOCK)
    largest = _largest(blocks)
    nearest = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * largest).flatten()[: weight.numel()].view_as(weight)


def _int8(weight: Tensor) -> Tensor:
    """Round each output's row to 255 values up to its largest magnitude."""
    largest = _largest(weight)
    return (weight / largest * 127).round() * largest / 127


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
