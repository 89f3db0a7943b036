"""The slots of `route`: room for adapters that are not there yet."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.merge_sources import base_sources
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import tensors
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import RouteSpec, Spec

_PLAIN = Word("lora")


def slot_name(number: int) -> str:
    """Return what an empty slot is called among adapters; none of them can have such a name."""
    return f"__slot_{number}__"


def is_slot(name: str) -> bool:
    """Whether a name is that of an empty slot."""
    return re.fullmatch(r"__slot_\d+__", name) is not None


def free_slots(spec: Spec) -> int:
    """Return how many slots there are beside the adapters of the spec, which are always there."""
    slots = spec.route.slots if spec.route else None
    return 0 if slots is None else max(0, slots - len(resident(spec)))


def room_of(route: RouteSpec, sites: Sequence[SitePlan]) -> AdapterPlan:
    """Return what a slot has room for: an adapter, not trained, at all sites of the spec's.

    Of rank `max_rank`, by default the largest of the spec's; with norms (DoRA) and biases of B
    where any adapter of the spec has them, in the dtypes of the first one there.
    """
    rank = route.max_rank or max((site.rank for site in sites), default=1)
    there: dict[str, list[SitePlan]] = {}
    for site in sites:
        there.setdefault(site.name, []).append(site)
    return AdapterPlan("", "none", tuple(_room(s, rank) for s in there.values()), (), (), (), ())


def named(room: AdapterPlan, name: str) -> AdapterPlan:
    """Return the plan of a slot as that of the adapter in it."""
    return replace(room, name=name, sites=tuple(replace(s, adapter=name) for s in room.sites))


def slot_sizes(spec: Spec, sites: Sequence[SitePlan]) -> tuple[int, int]:
    """Return the elements and the bytes of all slots beside the adapters of the spec."""
    if spec.route is None or not free_slots(spec):
        return 0, 0
    room, count = room_of(spec.route, sites).sites, free_slots(spec)
    size = sum(site.parameters * getattr(torch, site.dtype).itemsize for site in room)
    return count * sum(site.parameters for site in room), count * size


def slot_faults(spec: Spec, sites: Sequence[SitePlan]) -> list[Diagnostic]:
    """Return why there cannot be such slots: too few, without a place, or of such a rank."""
    route = spec.route
    if route is None or route.slots is None:
        return []
    there = len(resident(spec))
    if there > route.slots:
        message = f"`slots` is {route.slots}, and the spec has {there} adapters"
        help = f"write `slots = {there}` for them alone, and more for others to be loaded"
        return [Diagnostic("bad-slots", message, route.span, help=help)]
    if not sites and there < route.slots:
        message = "slots have room at the modules that adapters of the spec adapt: there are none"
        help = "write an adapter that targets all modules that adapters to come adapt"
        return [Diagnostic("bad-slots", message, route.span, help=help)]
    if there == route.slots:
        return []
    grouped = (s for s in room_of(route, sites).sites if s.rank % s.layer.groups)
    return [
        Diagnostic(
            "bad-slots",
            f"slots of rank {site.rank} are impossible at `{site.name}`",
            route.span,
            f"it has {site.layer.groups} groups",
            help=f"write a `max_rank` that is a multiple of {site.layer.groups}",
        )
        for site in grouped
    ][:1]


def resident(spec: Spec) -> list[str]:
    """Return the adapters that are always there: the spec's, and those that its merges make."""
    gone = base_sources(spec)
    return [one.name for one in (*spec.adapters, *spec.merges) if one.name not in gone]


def _room(there: Sequence[SitePlan], rank: int) -> SitePlan:
    dora = next((site.variant for site in there if site.variant.name == "dora"), _PLAIN)
    site = replace(
        there[0],
        rank=rank,
        alpha=float(rank),
        scaling=1.0,
        rslora=False,
        dropout=0.0,
        init=Word("default"),
        variant=dora,
        lora_bias=any(site.lora_bias for site in there),
        offload=False,
        trainable=False,
        tensors={},
        frozen=frozenset(),
        settings={},
    )
    return replace(site, tensors=tensors(site))
