"""Batches of data for inits: a mapping of the arguments of the model's `forward` each.

The model runs as it is, without adapters, in evaluation mode: dropout would draw other numbers each
time.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError

Batches = Iterable[Mapping[str, Any]]


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode; afterwards put back modes and what needs gradients."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, needed in flags:
            parameter.grad = None
            parameter.requires_grad_(needed)


def on_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    """Return a batch where the model is. Raises LoraFxError if it is no mapping."""
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise data_fault(f"a batch is a `{kind}`, no mapping of the arguments of the model", None)
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def data_fault(message: str, help: str | None) -> LoraFxError:
    """Return what is said of data that an init cannot use."""
    return LoraFxError((Diagnostic("calibration-data", message, help=help),))
