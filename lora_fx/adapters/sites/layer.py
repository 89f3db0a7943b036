"""What a site has to know of the layer that it is."""

from typing import TypeGuard

from torch import nn

from lora_fx.graph.convolution import Window


def output_scale(module: nn.Module) -> float:
    """Return what an embedding multiplies its output by (Gemma, BART), 1 for anything else."""
    if not isinstance(module, nn.Embedding):
        return 1.0
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module is a convolution that can be a site."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def window_of(module: nn.Module) -> Window | None:
    """Return where a convolution looks, None for anything else."""
    return Window.of(module) if is_convolution(module) else None
