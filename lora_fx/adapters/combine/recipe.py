"""How adapters are combined."""

from dataclasses import dataclass

import torch

from lora_fx.adapters.combine.operators import Method


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined: `rank` compresses the result, `clamped` limits its values.

    `dtype` is that of the result, else that of the parts, and at least float32.
    With `bounded` a rank beyond what a layer has room for is refused.
    """

    method: Method
    rank: int | None = None
    clamped: float | None = None
    seed: int = 0
    dtype: torch.dtype | None = None
    bounded: bool = True
