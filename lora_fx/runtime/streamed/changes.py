"""What one adapter makes of each tensor of a checkpoint."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.merged import changed_by
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.merging.run import has_rows, run_rows
from lora_fx.runtime.streamed.part_merged import can_add_to_part, with_delta
from lora_fx.runtime.streamed.shards import Stored
from lora_fx.runtime.streamed.stored_names import Part

_IN_MEMORY = "load the model, compile the spec, and save what `merge_and_unload` returns"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of a module: its own version, its delta, its rows.

    With a `part`, what it does to that part of the tensor. `beside` are the names of the tensor in
    other modules.
    """

    module: nn.Module
    name: str
    adapter: str
    beside: tuple[str, ...]
    part: Part | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """Return what becomes of a tensor, or of the part."""
        module, name, dtype = self.module, self.name, values.dtype
        if copies.has(module, self.adapter) and name in copies.tensors(module, self.adapter):
            own = copies.tensors(module, self.adapter)[name].detach().contiguous()
            values = (own if self.part is None else self.part.of(own)).to(dtype)
        site = storage.site_of(module, name)
        if site is not None and name in changed_by(site, self.adapter):
            values = with_delta(site, name, self.adapter, values, self.part)
        for rows in token_rows.rows_of(module, self.adapter) if name == "weight" else ():
            values = values.index_copy(0, rows.tokens, rows.weight.detach().to(dtype))
        return values

    @property
    def has_rows(self) -> bool:
        """Return whether some rows of the tensor can be changed by themselves."""
        module, name = self.module, self.name
        own = copies.has(module, self.adapter) and name in copies.tensors(module, self.adapter)
        site = storage.site_of(module, name)
        if self.part is not None or own or token_rows.rows_of(module, self.adapter):
            return False
        if site is None or name != site.lora_place[1] or name not in changed_by(site, self.adapter):
            return False
        return has_rows(site, self.adapter)

    def of_rows(self, rows: Tensor, start: int) -> Tensor:
        """Return what becomes of rows of a tensor that `has_rows`; they may be written over."""
        site = storage.site_of(self.module, self.name)
        assert site is not None
        return run_rows(site, (self.adapter,), rows, start)

    def of_part(self, part: Part) -> "Change | None":
        """Return the change of a part, or None if what is done there needs all of the tensor."""
        if part.whole:
            return self
        if self.name == "weight" and token_rows.rows_of(self.module, self.adapter):
            return None
        site = storage.site_of(self.module, self.name)
        if site is not None and self.name in changed_by(site, self.adapter):
            possible = self.name == "bias" or can_add_to_part(site, self.adapter, part)
            return replace(self, part=part) if possible else None
        return replace(self, part=part)

    def identity(self) -> tuple[int, ...]:
        """Return what is equal for modules that share the tensor and all that changes it."""
        module, name, adapter = self.module, self.name, self.adapter
        own = copies.tensors(module, adapter).get(name) if copies.has(module, adapter) else None
        site = storage.site_of(module, name)
        branches = {} if site is None else site.lora_branches
        branch = branches[adapter].A if adapter in branches else None
        rows = next(iter(token_rows.rows_of(module, adapter)), None)
        return id(copies.base_tensor(module, name)), id(own), id(branch), id(rows)


def changes_of(model: nn.Module, adapter: str) -> dict[str, Change]:
    """Return what an adapter of a model makes of the base's tensors, by their names in it.

    Modules that share a weight are all named, whether they share what changes it or not.
    """
    found: dict[str, Change] = {}
    holders = _holders(model)
    for fqn, module in storage.base_modules(model, itself=True).items():
        sites = storage.sites_at(module).values()
        names = {name for site in sites for name in changed_by(site, adapter)}
        names |= set(copies.tensors(module, adapter)) if copies.has(module, adapter) else set()
        names |= {"weight"} if token_rows.rows_of(module, adapter) else set()
        for name in sorted(names):
            full = f"{fqn}.{name}".lstrip(".")
            held = holders.get(id(copies.base_tensor(module, name)), [])
            beside = tuple(other for other in held if other != full)
            found[full] = Change(module, name, adapter, beside)
    return found


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each of the base's parameters, by its id."""
    found: dict[int, list[str]] = {}
    for fqn, module in storage.base_modules(model, itself=True).items():
        for name in module._parameters:
            full = f"{fqn}.{name}".lstrip(".")
            found.setdefault(id(copies.base_tensor(module, name)), []).append(full)
    return found


def in_checkpoint(
    changes: Mapping[str, Change], parts: Mapping[str, Part], stored: Mapping[str, Stored]
) -> dict[str, Change]:
    """Return the changes of a checkpoint's tensors, by the names that these have in it.

    Raises LoraFxError if a tensor to be changed is not there, or not all of it, or is packed.
    """
    found: dict[str, Change] = {}
    faults = []
    held = {part.fqn for part in parts.values()}
    for fqn, change in changes.items():
        alike = [n for n in change.beside if n in changes and _is_alike(changes[n], change)]
        if fqn not in held and not held.isdisjoint(alike):
            continue
        for other in (n for n in change.beside if fqn in held and n not in (*held, *alike)):
            message = f"the checkpoint stores one tensor for `{fqn}`, which changes, and `{other}`"
            faults.append(Diagnostic("cannot-merge", message, help=_IN_MEMORY))
        tensor = copies.base_tensor(change.module, change.name)
        there = {name: part for name, part in parts.items() if part.fqn == fqn}
        numbers = sum(torch.Size(part.shape).numel() for part in there.values())
        if tensor is None or not there or numbers < tensor.numel():
            message = f"the checkpoint has no tensor `{fqn}`"
            faults.append(Diagnostic("cannot-merge", message, help=_IN_MEMORY))
            continue
        faults += [fault for name, part in there.items() for fault in _faults(name, part, stored)]
        for name, part in there.items():
            of_part = change.of_part(part)
            if of_part is None:
                message = f"the checkpoint stores `{fqn}` in pieces, as `{name}`"
                faults.append(Diagnostic("cannot-merge", message, help=_IN_MEMORY))
                break
            found[name] = of_part
    if faults:
        raise LoraFxError(faults)
    return found


def _is_alike(one: Change, other: Change) -> bool:
    return one.identity() == other.identity()


def _faults(name: str, part: Part, stored: Mapping[str, Stored]) -> Iterator[Diagnostic]:
    if stored[name].floating is None:
        message = f"the checkpoint stores `{name}` in {stored[name].dtype}"
        help = f"merge into the checkpoint in 16 or 32 bits that it was made from, or {_IN_MEMORY}"
        yield Diagnostic("cannot-merge", message, help=help)
    elif stored[name].shape != part.shape:
        message = f"`{name}` is {stored[name].shape} in the checkpoint, not {part.shape}"
        yield Diagnostic("cannot-merge", message)
