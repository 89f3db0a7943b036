"""The scalings of the branches at a site: one tensor, made anew only where it is not right."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.adapters.sites.choice import Choice


class Placed(NamedTuple):
    """A tensor, what it was made of, and its version, which says that nobody has written to it."""

    scalings: Tensor
    values: tuple[float, ...]
    device: torch.device | None
    version: int


def place(
    module: nn.Module, name: str, choice: Choice, factor: float, there: Placed | None
) -> Placed:
    """Put the scalings of a choice, times a factor, into a buffer of this name, in place.

    (branches,), float32, on the device of the first branch's factors. Returned is what is there
    now: the same as before where that is right, or while there are no branches.
    """
    if there is not None and not _is_intact(there, module._buffers.get(name)):
        there = None
    if there is not None and not choice.added:
        return there
    device = choice.added[0].factors.A.weight.device if choice.added else None
    values = tuple(one.arithmetic.scaling * factor for one in choice.added)
    if there is not None and (there.values, there.device) == (values, device):
        return there
    with torch.inference_mode(False):  # it may stay for a step of training
        scalings = torch.tensor(values, dtype=torch.float32, device=device)
    module.register_buffer(name, scalings, persistent=False)
    return Placed(scalings, values, device, scalings._version)


def _is_intact(placed: Placed, buffer: Tensor | None) -> bool:
    own = placed.scalings
    return own is buffer and not own.is_inference() and own._version == placed.version
