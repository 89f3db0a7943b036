"""Quantise the linears of a tiny model with bitsandbytes, on the CPU."""

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import torch
from torch import nn


def nf4(model: nn.Module, **settings: object) -> nn.Module:
    """Replace every linear but the head by a double-quantised nf4 layer, in place."""
    return _each(model, partial(_four_bits, **{"quant_type": "nf4", **settings}))


def fp4(model: nn.Module) -> nn.Module:
    """Replace every linear but the head by an fp4 layer, in place."""
    return nf4(model, quant_type="fp4", compress_statistics=False)


def int8(model: nn.Module, threshold: float = 0.0) -> nn.Module:
    """Replace every linear but the head by a layer in 8 bits, in place."""
    return _each(model, partial(_eight_bits, threshold=threshold))


def _each(model: nn.Module, quantise: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in ("lm_head", "embed_out"):
                setattr(parent, name, quantise(child))
    return model


def _four_bits(linear: nn.Linear, **settings: object) -> nn.Module:
    quantised = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type=settings["quant_type"],
    )
    quantised.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), requires_grad=False, module=quantised, **settings
    )
    if linear.bias is not None:
        quantised.bias = linear.bias
    return quantised.to("cpu")


def _eight_bits(linear: nn.Linear, threshold: float) -> nn.Module:
    settings = {"has_fp16_weights": False, "threshold": threshold}
    biased = linear.bias is not None
    quantised = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, biased, **settings)
    quantised.weight = bnb.nn.Int8Params(
        linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
    )
    if biased:
        quantised.bias = linear.bias
    return quantised.to("cpu")
