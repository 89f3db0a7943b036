"""Models whose layers attend by `nn.MultiheadAttention`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

WIDTH, HEADS, CLASSES = 24, 4, 5


class Vit(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020) of torch's own layers."""

    def __init__(self, layers: int = 2, batch_first: bool = True) -> None:
        super().__init__()
        how: dict[str, Any] = {"dropout": 0.0, "batch_first": batch_first}
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, 10, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, **how, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x[:, 0])


def vit(**how: Any) -> Vit:
    torch.manual_seed(0)
    model = Vit(**how).eval().requires_grad_(False)
    for layer in model.encoder.layers:  # of which torch makes copies, with biases of zero
        for parameter in layer.self_attn.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def images(samples: int = 3) -> Tensor:
    return torch.randn(samples, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def siglip() -> SiglipVisionModel:
    """Whose head pools by attention: of one learned query to all patches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "image_size": 12, "patch_size": 4}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=HEADS)
    model = SiglipVisionModel(config).eval()
    for parameter in model.head.attention.parameters():  # transformers starts biases at zero
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def pooled(model: nn.Module, samples: int = 3, **more: Any) -> Tensor:
    result = model(pixel_values=images(samples), **more)
    assert isinstance(result, BaseModelOutputWithPooling)
    assert result.pooler_output is not None
    return result.pooler_output
