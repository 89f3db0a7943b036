"""Count parameters and bytes from shapes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.rules import AdapterPlan

_ADAMW_STATE = 2


@dataclass(frozen=True)
class Memory:
    """Bytes: AdamW keeps two moments of each trainable parameter in the parameter's dtype."""

    base: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """The sum; activations come on top."""
        return self.base + self.adapters + self.gradients + self.optimizer


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; packed 4-bit weights count what they stand for."""
    state: Any = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _tensors(tree: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and the scales of packed 4-bit weights; some more than once."""
    yield from tree.buffers()
    for parameter in tree.parameters():
        yield parameter
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:
            yield state.absmax
            state = getattr(state, "state2", None)


def estimate(
    tree: nn.Module,
    adapters: Iterable[AdapterPlan],
    quantized: Mapping[str, QuantizedModule],
) -> Memory:
    """Return the bytes that training needs beside its activations."""
    sizes = {id(tensor): tensor.nbytes for tensor in _tensors(tree)}
    for fqn, module in quantized.items():
        weight = tree.get_submodule(fqn).weight
        if getattr(weight, "quant_state", None) is None:
            sizes[id(weight)] = module.bytes
    added = trained = 0
    for adapter in adapters:
        for site in adapter.sites:
            width = getattr(torch, site.dtype).itemsize
            added += site.parameters * width
            trained += site.trained * width
        copies = _copied(tree, adapter)
        added += copies
        trained += copies
    return Memory(sum(sizes.values()), added, trained, _ADAMW_STATE * trained)


def _copied(tree: nn.Module, adapter: AdapterPlan) -> int:
    """Bytes of what is trained of the base itself, in the base's dtypes."""
    modules = (tree.get_submodule(copy.fqn) for copy in adapter.modules)
    copies = sum(p.nbytes for module in modules for p in module.parameters())
    rows = sum(
        rows.parameters * tree.get_submodule(rows.fqn).weight.element_size()  # type: ignore[operator]
        for rows in adapter.tokens
    )
    biases = sum(tree.get_parameter(bias.name).nbytes for bias in adapter.biases)
    return copies + rows + biases
