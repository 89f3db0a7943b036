"""What one adapter makes of each tensor of a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.merged import changed_by
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.merging import program as merge_program
from lora_fx.runtime.streamed.shards import Stored

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Changed:
    """What an adapter does to one tensor of a module: its own version, its delta, its rows."""

    module: nn.Module
    name: str
    adapter: str

    def __call__(self, values: Tensor) -> Tensor:
        module, name, dtype = self.module, self.name, values.dtype
        if copies.has(module, self.adapter) and name in copies.tensors(module, self.adapter):
            values = copies.tensors(module, self.adapter)[name].detach().to(dtype)
        site = storage.site_of(module, name)
        if site is not None and name in changed_by(site, self.adapter):
            values = _with_delta(site, name, self.adapter, values)
        for rows in token_rows.rows_of(module, self.adapter) if name == "weight" else ():
            values = values.index_copy(0, rows.tokens, rows.weight.detach().to(dtype))
        return values

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

    Modules that share a weight, and what changes it, are changed as the first of them.
    """
    found: dict[str, Change] = {}
    seen: set[tuple[int, ...]] = set()
    for fqn, module in storage.base_modules(model, itself=True).items():
        sites = storage.sites_at(module).values()
        names = {name for site in sites for name in changed_by(site, adapter)}
        names |= set(copies.tensors(module, adapter)) if copies.has(module, adapter) else set()
        names |= {"weight"} if token_rows.rows_of(module, adapter) else set()
        for name in sorted(names):
            change = _Changed(module, name, adapter)
            if change.identity() not in seen:
                seen.add(change.identity())
                found[f"{fqn}.{name}".lstrip(".")] = change
    return found


def require_there(changes: Mapping[str, Change], stored: Mapping[str, Stored]) -> None:
    """Raise LoraFxError if a tensor to be changed is not in the checkpoint, or is packed."""
    faults = []
    for name, change in changes.items():
        assert isinstance(change, _Changed)
        shape = getattr(copies.base_tensor(change.module, change.name), "shape", None)
        if name not in stored:
            message = f"the checkpoint has no tensor `{name}`"
            help = "save the model with transformers, which writes tensors under these names"
            faults.append(Diagnostic("cannot-merge", message, help=help))
        elif stored[name].floating is None:
            message = f"the checkpoint stores `{name}` in {stored[name].dtype}"
            help = "merge into the checkpoint in 16 or 32 bits that it was made from"
            faults.append(Diagnostic("cannot-merge", message, help=help))
        elif stored[name].shape != shape:
            message = (
                f"`{name}` is {stored[name].shape} in the checkpoint, not {tuple(shape or ())}"
            )
            faults.append(Diagnostic("cannot-merge", message))
    if faults:
        raise LoraFxError(faults)


@torch.no_grad()
def _with_delta(site: Site, name: str, adapter: str, values: Tensor) -> Tensor:
    if name == "bias":
        bias, scaling = site.lora_branches[adapter].B.bias, site.lora_arithmetic[adapter].scaling
        assert bias is not None
        wide = torch.promote_types(values.dtype, bias.dtype)
        return (values.to(wide) + scaling * bias.to(wide)).to(values.dtype)
    return merge_program.run(site, (adapter,), values)[name]
