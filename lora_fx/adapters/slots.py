"""Slots: room of one shape for adapters of any rank up to it, which come and go.

A slot is an adapter like the others, of zeros while it is empty. What is put into it, and how it is
called, changes no shape and no place in a graph.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_fx.adapters import storage
from lora_fx.adapters.bind import bind
from lora_fx.adapters.hotswap import Swap, obstacles, places, swap
from lora_fx.adapters.peft.keys import expected_shapes, prefixes_of
from lora_fx.adapters.peft.plain import PREFIX, plain
from lora_fx.adapters.peft.read import Loaded
from lora_fx.adapters.sites.slot_stack import SlotStack, can_be_stacked
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.slots import named
from lora_fx.spec.expressions import Word

_AS_PLAIN = ("velora", "bdlora")  # which compute what plain LoRA does, but for a gradient


def reserve(model: nn.Module, room: AdapterPlan, name: str) -> None:
    """Put an empty slot into the model, in place; it is not active."""
    bind(model, named(room, name), _zeros)


def stack(model: nn.Module, room: AdapterPlan, names: Sequence[str]) -> None:
    """Put the slots of these names, in place, in one tensor for each factor, where they can be."""
    placed = dict(storage.sites(model))
    for plan in room.sites:
        site = placed[plan.name]
        slots = [site.lora_branches[name] for name in names]
        if isinstance(site, nn.Linear | Conv1D) and can_be_stacked(slots):
            site.lora_slots = SlotStack(slots)


def misfits(room: AdapterPlan, new: Loaded, model: nn.Module) -> Iterator[str]:
    """Yield why an adapter that was read has no place in a slot."""
    yield from obstacles(room, Swap(new.plan, new.tensors), model, "a slot")


def fill(model: nn.Module, room: AdapterPlan, name: str, new: Loaded) -> AdapterPlan:
    """Put an adapter in the slot of this name, in place; return its plan, as it is there.

    There are no `misfits`. Where it has no site it adds nothing.
    """
    _swap(model, room, name, Swap(new.plan, new.tensors))
    own = replace(new.plan, sites=tuple(_in_slot(site) for site in plain(new.plan).sites))
    placed = dict(storage.sites(model))
    for site in own.sites:
        old = placed[site.name].lora_arithmetic[name]
        scaled = replace(old, alpha=site.alpha, scaling=site.scaling, rslora=site.rslora)
        storage.compute_as(model, placed[site.name], name, scaled)
    return own.with_trainable(False)


def clear(model: nn.Module, room: AdapterPlan, name: str) -> None:
    """Make the slot of this name add nothing, in place."""
    _swap(model, room, name, Swap(AdapterPlan(name, "none", (), (), (), (), ()), {}))


def _swap(model: nn.Module, room: AdapterPlan, name: str, new: Swap) -> None:
    swap(named(room, name), new, model)
    for module in model.modules():
        if isinstance(module, SlotStack):
            module.note_change()


def rename(model: nn.Module, old: str, new: str) -> None:
    """Call a slot otherwise, in place; it is not active."""
    for _, site in storage.sites(model):
        if old in site.lora_arithmetic:
            storage.rename(site, old, new)


def at_own_rank(
    tensors: Mapping[str, Tensor], room: AdapterPlan, plan: AdapterPlan, model: nn.Module
) -> dict[str, Tensor]:
    """Return what a file of the adapter in a slot holds, of all that is in the slot, by name."""
    shapes, prefixes = expected_shapes(plan, model), prefixes_of(plan)
    there = {site.name: site for site in room.sites}
    rows: dict[str, tuple[int, Tensor]] = {}
    for site in plan.sites:
        in_A, in_B = places(site.rank, there[site.name])
        prefix = f"{PREFIX}{prefixes[site.name]}"
        first, second = list(site.tensors)[:2]
        rows |= {f"{prefix}{first}": (0, in_A), f"{prefix}{second}": (1, in_B)}
    found = {name: tensor for name, tensor in tensors.items() if name in shapes}
    return {name: _narrow(tensor, shapes[name], rows.get(name)) for name, tensor in found.items()}


def _narrow(tensor: Tensor, shape: tuple[int, ...], rows: tuple[int, Tensor] | None) -> Tensor:
    """Return those rows of a tensor; of a tied layer, which has none of its own, the first ones."""
    if rows is not None:
        return tensor.index_select(rows[0], rows[1].to(tensor.device))
    return tensor[tuple(slice(size) for size in shape)].contiguous()


def _in_slot(site: SitePlan) -> SitePlan:
    if site.variant.name not in _AS_PLAIN:
        return site
    return replace(site, variant=Word("lora"))


def _zeros(site: SitePlan, module: nn.Module) -> dict[str, Tensor]:
    dtype = getattr(torch, site.dtype)
    factors = list(site.layer.shapes(site.rank))
    return {
        name: torch.zeros(shape, dtype=dtype)
        for name, shape in site.tensors.items()
        if name in factors or name.endswith("bias")
    }
