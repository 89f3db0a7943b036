"""Inputs of a training step for a model, by the kind of its main input."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_MAY_COME_TOO = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


class NoExample(ValueError):
    """No inputs can be made; the text says why, and `help` what to do about it."""

    def __init__(self, reason: str, help: str | None = None) -> None:
        super().__init__(reason)
        self.help = help


@dataclass(frozen=True)
class Example:
    """Arguments of `forward` on the meta device, and what they are in words."""

    inputs: dict[str, Any]
    text: str


def example_of(model: PreTrainedModel, batch: int, sequence: int | None) -> Example:
    """Return `batch` samples of `sequence` tokens, or of images or sounds of the model's size.

    A decoder beside an encoder gets `sequence` tokens too. Raises NoExample.
    """
    takes = inspect.signature(model.forward).parameters
    match model.main_input_name:
        case "input_ids" if "input_ids" in takes:
            inputs: dict[str, Any] = {"input_ids": _tokens(batch, sequence)}
            text = f"{sequence:,d} tokens"
            others = [name for name in _MAY_COME_TOO if name in takes]
            text += f", without `{others[0]}`" if others else ""
        case "pixel_values":
            inputs, text = _images(model, batch)
        case "input_features":
            inputs, text = _sounds(model, batch)
        case other:
            raise NoExample(f"its main input is `{other}`, of which no sizes are known")
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = _tokens(batch, sequence)
        if "input_ids" not in inputs:
            text += f" and {sequence:,d} tokens"
    if "use_cache" in takes:
        inputs["use_cache"] = False
    return Example(inputs, f"{batch:,d} × {text}")


def _tokens(batch: int, sequence: int | None) -> Tensor:
    if sequence is None:
        help = "give it too: `--sequence N`, or the argument `sequence`"
        raise NoExample("it reads tokens, and the number of a sample's tokens is not given", help)
    return torch.ones(batch, sequence, dtype=torch.long, device="meta")


def _images(model: PreTrainedModel, batch: int) -> tuple[dict[str, Any], str]:
    config = getattr(model.config, "vision_config", model.config)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(channels, int) or not isinstance(sides, list | tuple) or len(sides) != 2:
        raise NoExample("its config does not say how large its images are")
    pixels = torch.ones(batch, channels, *sides, dtype=model.dtype, device="meta")
    return {"pixel_values": pixels}, f"one image of {sides[0]}×{sides[1]}"


def _sounds(model: PreTrainedModel, batch: int) -> tuple[dict[str, Any], str]:
    """Make mel spectrograms of the length that Whisper's encoders take: two frames a position."""
    bands = getattr(model.config, "num_mel_bins", None)
    positions = getattr(model.config, "max_source_positions", None)
    if bands is None or positions is None:
        raise NoExample("its config does not say how long its sounds are")
    frames = torch.ones(batch, bands, 2 * positions, dtype=model.dtype, device="meta")
    return {"input_features": frames}, f"one sound of {2 * positions:,d} frames"
