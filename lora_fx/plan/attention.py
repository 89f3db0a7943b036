"""The matrices of `nn.MultiheadAttention`, which one target adapts together."""

from dataclasses import dataclass

from torch import nn

from lora_fx.plan.kinds import Layer

PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
OUT = "out_proj"


@dataclass(frozen=True)
class Part:
    """A matrix that is adapted: a parameter of the attention, or the weight of a module inside."""

    inside: str
    parameter: str | None
    layer: Layer


def parts_of(attention: nn.MultiheadAttention) -> tuple[Part, ...]:
    """Return the input projections (3 E, E), or (E, E), (E, kdim), (E, vdim), and the output's.

    The three are one matrix where queries, keys and values are of one width.
    """
    E = attention.embed_dim
    names = (PACKED,) if attention.in_proj_weight is not None else SEPARATE
    shapes = {name: attention.get_parameter(name).shape for name in names}
    inputs = (Part("", n, Layer("attention", wide, high)) for n, (high, wide) in shapes.items())
    return (*inputs, Part(OUT, None, Layer("attention", E, E)))
