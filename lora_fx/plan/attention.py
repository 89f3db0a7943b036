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
    weights = {name: attention._parameters[name] for name in (PACKED, *SEPARATE)}
    inputs = (
        Part("", name, Layer("attention", weight.shape[1], weight.shape[0]))
        for name, weight in weights.items()
        if weight is not None
    )
    return (*inputs, Part(OUT, None, Layer("attention", E, E)))
