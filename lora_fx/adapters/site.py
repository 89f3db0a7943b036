"""A marked module: an adaptable call that announces itself to the tracer as `lora_fx::site`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx.graph import ops
from lora_fx.graph.room import owns_room, with_room
from lora_fx.graph.structure import Branch, Structure

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


@dataclass(frozen=True)
class Arithmetic:
    """How one adapter's branch computes here.

    `scaling` is the number that multiplies B A x; `alpha` and `rslora` say where it came from.
    """

    alpha: float
    scaling: float
    rslora: bool
    dropout: float
    compute: str


class Site(_Base):
    """Mixin for a base module that carries adapters (see `dynamic_class.specialise`).

        y = base(x) + sum over active adapters of scaling * (B A drop(x) + b)

    for a linear layer, in either layout of its weight, or an embedding, whose x is one-hot. Where
    an adapter's factors lie, `storage` knows. With no active adapter the module computes what its
    base class computes, bit for bit.
    """

    lora_kind: str
    lora_scalings: Tensor
    lora_arithmetic: dict[str, Arithmetic]
    lora_active: tuple[str, ...]
    lora_branches: dict[str, "Factors"]
    _branches: tuple["Factors", ...]
    _training_key: str
    _evaluation_key: str
    weight: Tensor
    lora_room: bool = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base module, then announce the active branches."""
        output = super().forward(input, *args, **kwargs)
        if not self._branches:
            return output
        params = [tensor for factors in self._branches for tensor in factors.tensors()]
        key = self._training_key if self.training else self._evaluation_key
        return ops.site(output, input, params, self.lora_scalings, key)

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let these adapters, of those present here, take part in the forward, in this order."""
        self.lora_active = tuple(name for name in adapters if name in self.lora_arithmetic)
        self._branches = tuple(self.lora_branches[name] for name in self.lora_active)
        training = tuple(
            Branch(factors.rank, arithmetic.dropout, arithmetic.compute, factors.has_bias)
            for factors, arithmetic in zip(self._branches, self._active_arithmetic(), strict=True)
        )
        evaluation = tuple(replace(branch, dropout=0.0) for branch in training)
        padding = getattr(self, "padding_idx", None)
        self._training_key = str(Structure(self.lora_kind, training, padding))
        self._evaluation_key = str(Structure(self.lora_kind, evaluation, padding))
        self._place_scalings()

    def _active_arithmetic(self) -> list[Arithmetic]:
        return [self.lora_arithmetic[name] for name in self.lora_active]

    def _place_scalings(self) -> None:
        """Scalings are float32 on the parameters' device, whatever the module is cast to.

        An embedding that scales its output scales the branches with it.
        """
        device = self._branches[0].A.weight.device if self._branches else None
        factor = output_scale(self)
        values = [arithmetic.scaling * factor for arithmetic in self._active_arithmetic()]
        scalings = torch.tensor(values, dtype=torch.float32, device=device)
        self.register_buffer("lora_scalings", scalings, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_scalings()
        self.keep_room()
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.keep_room()

    def make_room(self) -> None:
        """Move the base weight (out, in) to where it has room, and again whenever it is moved."""
        wide = with_room(self.weight.detach())
        self._parameters["weight"] = nn.Parameter(wide, self.weight.requires_grad)
        self.lora_room = True

    def keep_room(self) -> None:
        """Make room beside the weight in force anew where it was packed."""
        if self.lora_room and not owns_room(self.weight):
            self.weight.data = with_room(self.weight.detach())


def output_scale(module: nn.Module) -> float:
    """Return what an embedding multiplies its output by (Gemma, BART), 1 for anything else."""
    if not isinstance(module, nn.Embedding):
        return 1.0
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


@dataclass(frozen=True)
class Factors:
    """The modules that hold one branch's A (r, in) and B (out, r).

    Of a `tied` branch they are those of the embedding whose weight the layer shares: there its
    delta is the transposed one, A is Bᵀ and B is Aᵀ.
    """

    A: nn.Linear
    B: nn.Linear
    tied: bool = False

    def tensors(self) -> list[Tensor]:
        """Return A, B and, if there is one, B's bias."""
        if self.tied:
            return [self.B.weight.t(), self.A.weight.t()]
        bias = self.B.bias
        return [self.A.weight, self.B.weight, *(() if bias is None else (bias,))]

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.A.weight.shape[0]

    @property
    def has_bias(self) -> bool:
        """Whether B has a bias."""
        return self.B.bias is not None
