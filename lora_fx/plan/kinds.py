"""What can be adapted: kinds of layers, their sizes, and the shapes of A and B for each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

Kind = Literal["linear", "transposed", "embedding", "conv", "attention", "parameter"]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """One layer that can be adapted, or one parameter of a module, seen as a map of features.

    `transposed` is Hugging Face's `Conv1D`, whose weight is (in, out); `attention` is
    `nn.MultiheadAttention`, or one of its matrices; an embedding's inputs are its rows. `experts`
    counts the matrices that a parameter stacks, `groups` and `kernel` are a convolution's. A
    `packed` weight is in 4 or 8 bits. A parameter is `turned` where it is (experts, in, out).
    """

    kind: Kind
    in_features: int
    out_features: int
    experts: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()
    packed: bool = False
    turned: bool = False

    @property
    def largest_rank(self) -> int:
        """The rank beyond which B A says nothing more."""
        return min(self.in_features * math.prod(self.kernel), self.out_features)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B by PEFT's names."""
        wide, high = self.in_features, self.out_features
        match self.kind:
            case "embedding":
                return {"lora_embedding_A": (rank, wide), "lora_embedding_B": (high, rank)}
            case "conv":
                ones = (1,) * len(self.kernel)
                return {
                    "lora_A.weight": (rank, wide, *self.kernel),
                    "lora_B.weight": (high, rank // self.groups, *ones),
                }
            case _:
                return {
                    "lora_A.weight": (self.experts * rank, wide),
                    "lora_B.weight": (high, rank * self.experts),
                }


def has_computed_weight(module: nn.Module) -> bool:
    """Whether a module's weight is made of other parameters (`torch.nn.utils.parametrize`)."""
    return "weight" not in module._parameters and isinstance(
        getattr(module, "weight", None), Tensor
    )


def layer_of(module: nn.Module) -> Layer | None:
    """Return a module as a layer to adapt, or None if it is none."""
    if has_computed_weight(module):
        return None
    match module:
        case nn.Linear() if not isinstance(module, NonDynamicallyQuantizableLinear):
            packed = not module.weight.is_floating_point() or hasattr(module.weight, "quant_state")
            return Layer("linear", module.in_features, module.out_features, packed=packed)
        case Conv1D():
            return Layer("transposed", module.weight.shape[0], module.weight.shape[1])
        case nn.Embedding():
            return Layer("embedding", module.num_embeddings, module.embedding_dim)
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            sizes = module.in_channels, module.out_channels
            return Layer("conv", *sizes, 1, module.groups, tuple(module.kernel_size))
        case nn.MultiheadAttention() if _computes_as_torch_does(module):
            return Layer("attention", module.embed_dim, 3 * module.embed_dim)
        case _:
            return None


def _computes_as_torch_does(module: nn.MultiheadAttention) -> bool:
    """Whether no subclass computes in a way of its own; what adapters add does not count."""
    own = (
        vars(cls)["forward"]
        for cls in type(module).__mro__
        if "forward" in vars(cls)
        and "__lora_fx__" not in vars(cls)
        and not cls.__module__.startswith("lora_fx.")
    )
    return next(own) is nn.MultiheadAttention.forward and isinstance(module.out_proj, nn.Linear)


def parameter_layer(owner: nn.Module, parameter: Tensor) -> Layer | None:
    """Return a parameter as a layer: (out, in), or (experts, out, in) stacked.

    Stacked parameters of a module that says `is_transposed` are (experts, in, out). None for what
    is packed in 4 or 8 bits.
    """
    if parameter.dtype.itemsize == 1 or not parameter.is_floating_point():
        return None
    if parameter.ndim == 2:
        return Layer("parameter", parameter.shape[1], parameter.shape[0])
    if parameter.ndim != 3:
        return None
    experts, high, wide = parameter.shape
    turned = bool(getattr(owner, "is_transposed", False))
    if turned:
        wide, high = high, wide
    return Layer("parameter", wide, high, experts, turned=turned)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is called, in either layout of its weight.

    `nn.MultiheadAttention` reads the weight of its output projection and never calls it.
    """
    layer = layer_of(module)
    return layer is not None and layer.kind in ("linear", "transposed")
