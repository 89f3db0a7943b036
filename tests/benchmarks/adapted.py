"""One base adapted by lora_fx and by PEFT, on the same weights, and the training step of either."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fx
from tests.benchmarks.interleaved import Step

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """What lora_fx and PEFT alike put on the base; the scaling is 2."""

    rank: int
    dropout: float
    targets: tuple[str, ...]
    variant: str = "lora"

    def plain(self) -> "Adapter":
        """Return the same as LoRA."""
        return replace(self, variant="lora")

    def dry(self) -> "Adapter":
        """Return the same without dropout."""
        return replace(self, dropout=0.0)


def by_lora_fx(
    base: Model, adapter: Adapter, unit: str, layout: str = "plain", inplace: bool = False
) -> Model:
    """Adapt with lora_fx: fp32 adapters, compiled on the first call."""
    spec = f"""lora 1
    adapter default {{
      rank = {adapter.rank}
      alpha = {2 * adapter.rank}
      dropout = {adapter.dropout}
      variant = {adapter.variant}
      target {", ".join(adapter.targets)}
    }}
    compile {{ unit = {unit}  layout = {layout} }}"""
    return trained(lora_fx.compile(base, spec, inplace=inplace))


def by_peft(base: nn.Module, adapter: Adapter, upcast: bool) -> nn.Module:
    """Adapt with PEFT, eager; `upcast` makes the adapters fp32, as PEFT does by default."""
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        use_dora=adapter.variant == "dora",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(twin(base), config, autocast_adapter_dtype=upcast)  # type: ignore[arg-type]
    return trained(model)


def twin(base: Model) -> Model:
    """Copy the module tree, not the weights."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def trained(model: Model) -> Model:
    """Fill the adapters' zeros: a GPU that multiplies zeros takes less power and clocks higher."""
    with torch.no_grad():
        for parameter in trainable(model):
            if not parameter.any():
                parameter.normal_(std=0.02)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(
    forward: Callable[[], Sequence[Tensor]], gradients: Sequence[Tensor], leaves: Iterable[Tensor]
) -> Step:
    """Return a forward and backward that then drops the leaves' gradients, as `zero_grad` does."""
    leaves = list(leaves)

    def step() -> None:
        torch.autograd.backward(forward(), gradients)
        for leaf in leaves:
            leaf.grad = None

    return step
