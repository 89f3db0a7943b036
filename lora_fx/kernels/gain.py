"""`lora_fx::gain`: by how much DoRA's magnitudes stretch rows, computed once for all readers.

    gain(m, n) = m / n - 1          m, n: (out,), or with further dimensions of 1

Liu et al. 2024, arXiv 2402.09353, eq. 5; n, the norms, have no gradient (§4.3). As an operator it
stays a tensor of its own: written into what reads it, a division and two reads would take place for
each element of an output, forward and backward, where a multiplication by one number is enough.
"""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("lora_fx", "FRAGMENT")
_library.define("gain(Tensor m, Tensor norms) -> Tensor")


def _gain(m: Tensor, norms: Tensor) -> Tensor:
    return torch.sub(torch.div(m, norms), 1)


def _shape(m: Tensor, norms: Tensor) -> Tensor:
    return torch.empty_like(m, dtype=torch.promote_types(m.dtype, norms.dtype))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    m, norms = inputs
    ctx.dtype = m.dtype
    ctx.save_for_backward(norms)


def _gradients(ctx: Any, dgain: Tensor) -> tuple[Tensor, None]:
    (norms,) = ctx.saved_tensors
    return torch.div(dgain, norms).to(ctx.dtype), None


_library.impl("gain", _gain, "CPU")
_library.impl("gain", _gain, "CUDA")
torch.library.register_fake("lora_fx::gain", _shape, lib=_library)
torch.library.register_autograd("lora_fx::gain", _gradients, setup_context=_keep, lib=_library)

gain = torch.ops.lora_fx.gain.default
