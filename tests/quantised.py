"""Quantise the linears of a tiny model with bitsandbytes, on the CPU."""

import bitsandbytes as bnb
import torch
from torch import nn


def nf4(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by a double-quantised nf4 layer, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in ("lm_head", "embed_out"):
                setattr(parent, name, _quantise(child))
    return model


def _quantise(linear: nn.Linear) -> nn.Module:
    quantised = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    quantised.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, quant_type="nf4", module=quantised
    )
    if linear.bias is not None:
        quantised.bias = linear.bias
    return quantised.to("cpu")
