"""The spec that lies beside saved adapters."""

import dataclasses
from pathlib import Path

from torch import nn

from lora_fx.adapters.peft.read import layer_ranges
from lora_fx.adapters.peft.write import CONFIG
from lora_fx.adapters.storage import sites
from lora_fx.diagnostics import Source
from lora_fx.plan.merge_sources import base_sources
from lora_fx.plan.plan import plan_sites
from lora_fx.plan.slots import resident
from lora_fx.spec import parse
from lora_fx.spec.flat import flat_text
from lora_fx.spec.spec import RouteSpec, Spec

NAME = "spec.lora"


def save_spec(beside: Path, folder: Path, spec: Spec) -> None:
    """Write the spec in one file, as it was read where it can be, to be moved into `folder`."""
    if spec.source.text:
        (beside / NAME).write_text(flat_text(spec, folder), encoding="utf-8")


def frame_of(folder: Path, adapter: Path) -> Spec:
    """Return the spec that a saved folder's adapters fit into; of its own it has what the base is.

    That is what merges put into the base, and the adapters that they take from. Without a spec in
    the folder, layer replication is what the adapter's config says. Its slots are in `slots_of`.
    """
    if (folder / NAME).exists():
        spec = parse(folder / NAME)
        kept = base_sources(spec)
        adapters = tuple(adapter for adapter in spec.adapters if adapter.name in kept)
        merges = tuple(merge for merge in spec.merges if merge.name in kept)
        route = dataclasses.replace(spec.route, slots=None) if spec.route else None
        return dataclasses.replace(spec, adapters=adapters, checks=(), merges=merges, route=route)
    return dataclasses.replace(parse(_frame(adapter)), source=Source(str(adapter / CONFIG), ""))


def slots_of(folder: Path) -> tuple[RouteSpec | None, list[str]]:
    """Return the route of the spec in a saved folder, if it has slots, and the adapters beside."""
    spec = parse(folder / NAME) if (folder / NAME).exists() else None
    if spec is None or spec.route is None or spec.route.slots is None:
        return None, []
    return spec.route, resident(spec)


def restore_arithmetic(model: nn.Module, folder: Path) -> None:
    """Give loaded adapters the dropout and compute dtype of the saved spec, module by module.

    PEFT's config cannot say them. Adapters and modules that the spec does not name keep theirs, and
    so do adapters that came from a folder of their own.
    """
    if not (folder / NAME).exists():
        return
    spec = parse(folder / NAME)
    named = tuple(adapter for adapter in spec.adapters if "weights" not in adapter.settings)
    spec = dataclasses.replace(spec, adapters=named, checks=(), route=None, merges=())
    placed = dict(sites(model))
    for planned in plan_sites(spec, model).sites:
        site = placed.get(planned.name)
        if site is not None and planned.adapter in site.lora_arithmetic:
            site.lora_arithmetic[planned.adapter] = dataclasses.replace(
                site.lora_arithmetic[planned.adapter],
                dropout=planned.dropout,
                compute=planned.compute,
            )


def _frame(adapter: Path) -> str:
    ranges = layer_ranges(adapter)
    if not ranges:
        return "lora 1\n"
    return f"lora 1\nlayers {{ replicate {', '.join(f'{a}..{b}' for a, b in ranges)} }}\n"
