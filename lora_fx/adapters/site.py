"""A marked module: an adaptable call that announces itself to the tracer as `lora_fx::site`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_fx.graph import ops
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

        y = base(x) + sum over active adapters of scaling * B A drop(x)

    Parameters are `lora_A.<adapter>.weight` (r, in) and `lora_B.<adapter>.weight` (out, r). With no
    active adapter the module computes what its base class computes, bit for bit.
    """

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_scalings: Tensor
    lora_arithmetic: dict[str, Arithmetic]
    lora_active: tuple[str, ...]
    _branches: tuple[tuple[nn.Linear, nn.Linear], ...]
    _training_key: str
    _evaluation_key: str

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the base module, then announce the active branches."""
        output = super().forward(input, *args, **kwargs)
        if not self._branches:
            return output
        params = [factor.weight for pair in self._branches for factor in pair]
        key = self._training_key if self.training else self._evaluation_key
        return ops.site(output, input, params, self.lora_scalings, key)

    def activate(self, adapters: tuple[str, ...]) -> None:
        """Let these adapters, of those present here, take part in the forward, in this order."""
        self.lora_active = tuple(name for name in adapters if name in self.lora_arithmetic)
        self._branches = tuple(
            (self.lora_A[n], self.lora_B[n])  # type: ignore[misc]
            for n in self.lora_active
        )
        training = tuple(
            Branch(A.weight.shape[0], arithmetic.dropout, arithmetic.compute)
            for (A, _), arithmetic in zip(self._branches, self._active_arithmetic(), strict=True)
        )
        evaluation = tuple(replace(branch, dropout=0.0) for branch in training)
        self._training_key = str(Structure("linear", training))
        self._evaluation_key = str(Structure("linear", evaluation))
        self._place_scalings()

    def _active_arithmetic(self) -> list[Arithmetic]:
        return [self.lora_arithmetic[name] for name in self.lora_active]

    def _place_scalings(self) -> None:
        """Scalings are float32 on the parameters' device, whatever the module is cast to."""
        device = self._branches[0][0].weight.device if self._branches else None
        values = [arithmetic.scaling for arithmetic in self._active_arithmetic()]
        scalings = torch.tensor(values, dtype=torch.float32, device=device)
        self.register_buffer("lora_scalings", scalings, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_scalings()
        return self
