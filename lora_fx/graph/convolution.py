"""What a convolution does besides its weight: how it moves over an input, and pads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)  # by dimensions, less one
_TEXT = re.compile(r"(\d+(?:x\d+)*):(\d+\+\d+(?:x\d+\+\d+)*):(\d+(?:x\d+)*):(\w+)")


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, of 1, 2 or 3 dimensions.

    `padding` are the places before and after each dimension, filled as `mode` says, which is a
    `padding_mode` of `nn.Conv2d`.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    mode: str = "zeros"

    @staticmethod
    def of(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> "Window":
        """Return the window of a layer; `same` and `valid` are told in numbers."""
        stride, dilation = tuple(module.stride), tuple(module.dilation)
        if module.padding == "valid":
            padding = tuple((0, 0) for _ in stride)
        elif module.padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, module.kernel_size, strict=True)]
            padding = tuple((total // 2, total - total // 2) for total in whole)
        else:
            padding = tuple((int(one), int(one)) for one in module.padding)
        return Window(stride, padding, dilation, module.padding_mode)

    def __str__(self) -> str:
        sides = "x".join(f"{before}+{after}" for before, after in self.padding)
        stride, dilation = ("x".join(map(str, one)) for one in (self.stride, self.dilation))
        return f"{stride}:{sides}:{dilation}:{self.mode}"

    @staticmethod
    @cache
    def parse(text: str) -> "Window":
        """Read a text back; `Window.parse(str(w)) == w`. Raises ValueError for any other."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"`{text}` is not a window of a structure")
        stride, dilation = (tuple(map(int, one.split("x"))) for one in (found[1], found[3]))
        sides = [tuple(map(int, one.split("+"))) for one in found[2].split("x")]
        return Window(stride, tuple(sides), dilation, found[4])  # type: ignore[arg-type]

    @property
    def dimensions(self) -> int:
        """How many dimensions an input has behind its channels."""
        return len(self.stride)

    @property
    def around(self) -> tuple[int, ...]:
        """What is padded ahead of the convolution, as `F.pad` takes it; nothing for equal zeros."""
        if self._inside is not None:
            return ()
        return tuple(side for sides in reversed(self.padding) for side in sides)

    @property
    def pad_mode(self) -> str:
        """The mode as `F.pad` names it."""
        return "constant" if self.mode == "zeros" else self.mode

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Stride, padding and dilation, as `F.conv2d` takes them."""
        inside = (0,) * self.dimensions if self._inside is None else self._inside
        return self.stride, inside, self.dilation

    @property
    def _inside(self) -> tuple[int, ...] | None:
        """The zeros that a convolution adds by itself, None if it cannot."""
        equal = all(before == after for before, after in self.padding)
        return tuple(one for one, _ in self.padding) if equal and self.mode == "zeros" else None


def convolution(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Convolve x (*, in, …) with a weight (out, in, k…)."""
    if window.around:
        x = F.pad(x, window.around, window.pad_mode)
    return CONVOLUTIONS[window.dimensions - 1](x, weight, None, *window.arguments)


def pointwise(h: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Map h (*, r, …) by B (out, r / groups, 1…) at every place; h (*, r) by B (out, r)."""
    if B.dim() == 2:
        return F.linear(h, B, bias)
    function, groups = pointwise_of(h, B)
    return function(h, B, bias, groups=groups)


def pointwise_of(h: Tensor, B: Tensor) -> tuple[Callable[..., Tensor], int]:
    """Return the convolution that applies B, and its groups."""
    dimensions = B.dim() - 2
    return CONVOLUTIONS[dimensions - 1], h.shape[-1 - dimensions] // B.shape[1]


def by_channel(values: Tensor, dimensions: int) -> Tensor:
    """Return a value for each channel, (out,) or (1, out, 1…), as (out, 1…)."""
    return values.reshape(-1, *(1,) * dimensions)
