"""Inputs for the tiny architectures, with labels."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.architectures import VOCABULARY

SAMPLES, LENGTH, IMAGE_TOKEN = 3, 11, 3


def example_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return one batch in the model's dtype, the same at every call."""
    generator = torch.Generator().manual_seed(1)

    def ids(high: int = VOCABULARY, length: int = LENGTH) -> Tensor:
        return torch.randint(min(4, high - 2), high, (SAMPLES, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(SAMPLES, *shape, generator=generator).to(model.dtype)

    text = {"input_ids": ids()}
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    match type(model).__name__:
        case name if "ForImageClassification" in name:
            return {"pixel_values": noise(3, 16, 16), "labels": torch.tensor([0, 1, 2])}
        case name if name.startswith("Whisper"):
            return {"input_features": noise(12, 40), "labels": ids(length=7)}
        case name if name.startswith("Llava"):
            text["input_ids"][:, 2:6] = IMAGE_TOKEN
            return {**text, "pixel_values": noise(3, 16, 16), "labels": text["input_ids"]}
        case name if "ForSequenceClassification" in name:
            return {**text, "labels": torch.tensor([0, 1, 0])}
        case name if "ForTokenClassification" in name:
            return {**text, "labels": ids(2)}
        case name if "ForQuestionAnswering" in name:
            ends = {"start_positions": torch.tensor([1, 2, 3])}
            return {**text, **ends, "end_positions": torch.tensor([4, 5, 6])}
        case name if "ForConditionalGeneration" in name:
            return {**text, "labels": ids(length=7)}
        case _:
            return {**text, "labels": text["input_ids"]}
