"""A base in 4 or 8 bits made ready to be trained through: what of it is in 16 bits."""

from typing import Literal

import torch
from torch import nn

_SHORT = (torch.float16, torch.bfloat16)
_FEW = "a scale or a bias: float32 costs little, and what it multiplies is not rounded once more"
_EVERY = "its products are in float32, as PEFT's are"


def prepare_for_kbit_training(
    model: nn.Module, upcast: Literal["norms", "all"] = "all"
) -> dict[str, str]:
    """Freeze a model and upcast what is in 16 bits to float32, in place; return what, and why.

    `all` is PEFT's `prepare_model_for_kbit_training`. `norms` leaves out what has more than one
    dimension, embeddings and the head: float32 holds nothing of them that 16 bits do not, and takes
    twice the memory; but what norms give is float32 then, which a head in 16 bits multiplies only
    under autocast, as of `Trainer(bf16=True)`. Packed weights stay. Checkpointing, which PEFT's
    function switches on, is `checkpoint` in the spec or `Trainer`'s own. Raises ValueError for
    another word.
    """
    if upcast not in ("norms", "all"):
        raise ValueError(f"`upcast` is `norms` or `all`, not {upcast!r}")
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        few = parameter.dim() <= 1
        if parameter.dtype in _SHORT and (few or upcast == "all") and not _is_packed(parameter):
            parameter.data = parameter.data.float()
            found[name] = _FEW if few else _EVERY
    return found


def _is_packed(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "quant_state", None) is not None
