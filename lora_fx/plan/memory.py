"""Count parameters and bytes from shapes."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.graph.room import ROOM
from lora_fx.plan.offloaded import distinct_parameters
from lora_fx.plan.optimizer_state import state_bytes
from lora_fx.plan.packed import packing_of, plain_dtype
from lora_fx.plan.quantization import QuantizedModule
from lora_fx.plan.room import weights_with_room
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.token_routing import routed
from lora_fx.spec.spec import ArrowSpec, Spec


@dataclass(frozen=True)
class Memory:
    """Bytes of the base, of what adapters add to it, of gradients and of the optimizer's state."""

    base: int
    adapters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class _Size:
    """A tensor's elements, and the bytes of each."""

    elements: int
    width: int


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of a parameter; packed 4-bit weights count what they stand for."""
    state: Any = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def estimate(
    tree: nn.Module,
    adapters: Iterable[AdapterPlan],
    quantized: Mapping[str, QuantizedModule],
    dequantized: Collection[str],
    spec: Spec,
) -> Memory:
    """Return the bytes that training needs beside its activations.

    With `layout = augmented`, adapted weights are held a second time, with room beside them; those
    that an init changes are so in any case. Those that are `dequantized` are held as they are then.
    Adapters that tokens are routed to have prototypes too, and differences from what is general.
    """
    augmented = spec.compile.layout == "augmented"
    arrow = spec.route.arrow if spec.route else None
    sizes = {id(tensor): tensor.nbytes for tensor in _tensors(tree)}
    for fqn, module in quantized.items():
        whole = tree.get_submodule(fqn).weight
        if getattr(whole, "quant_state", None) is None:
            sizes[id(whole)] = module.bytes
    for module in (tree.get_submodule(fqn) for fqn in dequantized):
        weight: Any = module.weight
        if packing_of(module) is not None:
            sizes |= dict.fromkeys((id(scales) for scales in scales_of(weight)), 0)
            width = (plain_dtype(tree) or torch.float32).itemsize
            sizes[id(weight)] = count_elements(weight) * width
    adapters = list(adapters)
    added = _with_room(tree, adapters, quantized) if augmented else 0
    added += sum(_routed(adapters, arrow)) if arrow is not None else 0
    trained = []
    for adapter in adapters:
        of_base = [*_copies(tree, adapter), *_rows(tree, adapter), *_biases(tree, adapter)]
        added += sum(size.elements * size.width for _, size in of_base)
        added += sum((site.parameters + site.kept) * _width(site.dtype) for site in adapter.sites)
        changed = _changed(tree, adapter, quantized, augmented)
        added += sum(weight.nbytes for weight in changed)
        trained += [size for is_trained, size in of_base if is_trained]
        trained += _of_sites(adapter)
    return Memory(
        sum(sizes.values()),
        added,
        sum(size.elements * size.width for size in trained),
        sum(state_bytes(size.elements, size.width, spec.optimizer) for size in trained),
    )


def merged_bytes(
    tree: nn.Module, adapters: Iterable[AdapterPlan], quantized: Collection[str]
) -> int:
    """Return the bytes that weights take a second time while all adapters are merged into them.

    Packed weights are not merged into, nor are convolutions with groups.
    """
    held: dict[int, int] = {}
    sites = (site for adapter in adapters for site in adapter.sites)
    for site in (s for s in sites if s.layer.groups == 1 and s.fqn not in quantized):
        module = tree.get_submodule(site.fqn)
        names = (site.weight, "bias") if site.lora_bias else (site.weight,)
        for tensor in (module._parameters.get(name) for name in names):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                held[id(tensor)] = tensor.nbytes
    return sum(held.values())


def _tensors(tree: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and the scales of packed 4-bit weights; some more than once."""
    yield from tree.buffers()
    for parameter in distinct_parameters(tree):
        yield parameter
        yield from scales_of(parameter)


def scales_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the scales of a packed 4-bit weight, and those that they are packed with in turn."""
    state: Any = getattr(tensor, "quant_state", None)
    while state is not None:
        yield state.absmax
        state = getattr(state, "state2", None)


def _of_sites(adapter: AdapterPlan) -> Iterator[_Size]:
    """Yield the tensors of sites that get gradients."""
    for site in adapter.sites:
        for name in site.trained_tensors:
            yield _Size(math.prod(site.tensors[name]), _width(site.dtype))


def _routed(adapters: list[AdapterPlan], arrow: ArrowSpec) -> Iterator[int]:
    """Yield the bytes that each site of an adapter takes which tokens are routed to."""
    plans = {plan.name: plan for plan in adapters}
    for site in (site for name in routed(arrow, plans) for site in plans[name].sites):
        prototype = site.in_features * max(4, _width(site.dtype))
        yield prototype + (site.parameters * _width(site.dtype) if arrow.general else 0)


def _with_room(tree: nn.Module, adapters: list[AdapterPlan], quantized: Collection[str]) -> int:
    linear = (s.fqn for a in adapters for s in a.sites if s.layer.kind == "linear")
    sites = dict.fromkeys(fqn for fqn in linear if fqn not in quantized)
    weights = weights_with_room(tree, sites).values()
    return sum(w.shape[0] * (w.shape[1] + ROOM) * w.element_size() for w in weights)


def _changed(
    tree: nn.Module, adapter: AdapterPlan, quantized: Collection[str], augmented: bool
) -> Iterator[Tensor]:
    """Yield the weights that an adapter changes, and that are not made anew for it anyway."""
    changing = [s for s in adapter.sites if s.changes_base and s.fqn not in quantized]
    moved = weights_with_room(tree, [site.fqn for site in changing]) if augmented else {}
    for site in (site for site in changing if site.fqn not in moved):
        weight = tree.get_submodule(site.fqn)._parameters[site.weight]
        assert weight is not None
        yield weight


def _copies(tree: nn.Module, adapter: AdapterPlan) -> Iterator[tuple[bool, _Size]]:
    """Yield whether a copy is trained, and its parameters, in the base's dtypes."""
    for copy in adapter.modules:
        for parameter in tree.get_submodule(copy.fqn).parameters():
            yield copy.trainable, _Size(parameter.numel(), parameter.element_size())


def _rows(tree: nn.Module, adapter: AdapterPlan) -> Iterator[tuple[bool, _Size]]:
    for rows in adapter.tokens:
        weight: Any = tree.get_submodule(rows.fqn).weight
        yield rows.trainable, _Size(rows.parameters, weight.element_size())


def _biases(tree: nn.Module, adapter: AdapterPlan) -> Iterator[tuple[bool, _Size]]:
    for bias in adapter.biases:
        width = tree.get_parameter(bias.name).element_size()
        yield bias.trainable, _Size(bias.parameters, width)


def _width(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
