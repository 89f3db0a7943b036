"""An adapter that changed the base's weights, as plain LoRA over the original base.

In a file it has twice the rank, A′ = [A; A₀] and B′ = [B, −B₀], so that s B′ A′ = s (B A − B₀ A₀)
is all that it and its change do to W: whatever reads plain LoRA computes the same, bit for bit the
same tensors come back here, and nothing is decomposed again. The header of the file says which
modules these are, how they were started, and of which base weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.sites.site import Site
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import CHANGES_BASE, TAKES_FROM_BASE, SitePlan
from lora_fx.plan.variants import frozen, tensors
from lora_fx.spec.expressions import Word

PREFIX = "base_model.model."
_KEY = "lora_fx.changed_weights"
_A, _B = "lora_A.weight", "lora_B.weight"
_DEFAULT = Word("default")


@dataclass(frozen=True)
class Origin:
    """The init of a site that changed its weight, and the fingerprint of the weight before."""

    init: str
    base: str


def plain(plan: AdapterPlan) -> AdapterPlan:
    """Return the plan of what a file of this adapter holds: no init changes a weight there."""
    return replace(plan, sites=tuple(_with_rank(site, 2 * site.rank) for site in plan.sites))


def as_named(plan: AdapterPlan) -> AdapterPlan:
    """Return the plan with the ranks that it has and no init that changes a weight."""
    return replace(plan, sites=tuple(_with_rank(site, site.rank) for site in plan.sites))


def with_origins(plan: AdapterPlan, origins: Mapping[str, Origin]) -> AdapterPlan:
    """Return the plan that `plain` makes this one of; `origins` are by fqn."""
    sites = (
        _resized(site, site.rank // 2, Word(origins[site.name].init))
        if site.name in origins and origins[site.name].init in TAKES_FROM_BASE
        else site
        for site in plan.sites
    )
    return replace(plan, sites=tuple(sites))


def _with_rank(site: SitePlan, rank: int) -> SitePlan:
    return _resized(site, rank, _DEFAULT) if site.takes_from_base else site


def _resized(site: SitePlan, rank: int, init: Word) -> SitePlan:
    site = replace(site, rank=rank, init=init, tensors={})
    return replace(site, tensors=tensors(site), frozen=frozen(site))


def joined(site: Site, adapter: str) -> dict[str, Tensor]:
    """Return A′ (2r, in) and B′ (out, 2r) of a site whose weight the adapter changed."""
    change = site.lora_change
    assert change is not None
    own, start = site.lora_branches[adapter], change.factors
    ratio = change.arithmetic.scaling / site.lora_arithmetic[adapter].scaling
    return {
        _A: torch.cat([own.A.weight, start.A.weight]).detach(),
        _B: torch.cat([own.B.weight, start.B.weight * -ratio], 1).detach(),
    }


def doubled(
    state: Mapping[str, Tensor], prefix: str, start: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return A′ and B′ of a site by their names in a file, of A and B in it and a start.

    `prefix` is what their names begin with.
    """
    A, B = (f"{PREFIX}{prefix}{name}" for name in (_A, _B))
    return {
        A: torch.cat([state[A], start[_A].to(state[A])]),
        B: torch.cat([state[B], -start[_B].to(state[B])], 1),
    }


def split(
    state: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Return A and B of a site by their names in a file, and A₀ and B₀."""
    A, B = (f"{PREFIX}{prefix}{name}" for name in (_A, _B))
    rank = state[A].shape[0] // 2
    own = {A: state[A][:rank], B: state[B][:, :rank]}
    return own, (state[A][rank:], -state[B][:, rank:])


def header(model: nn.Module, plan: AdapterPlan) -> dict[str, str]:
    """Return what the header of a file says of the sites whose weights an adapter changed."""
    placed = dict(storage.sites(model))
    changes = [
        (site, placed[site.name].lora_change)
        for site in plan.sites
        if site.init.name in CHANGES_BASE
    ]
    found = {site.name: [site.init.name, change.base] for site, change in changes if change}
    return {_KEY: json.dumps(found, sort_keys=True)} if found else {}


def read_origins(file: Path) -> dict[str, Origin]:
    """Return what the header of a file says, by fqn. Raises ValueError if it makes no sense."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_KEY, "{}")
    try:
        return {fqn: Origin(str(init), str(base)) for fqn, (init, base) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`{_KEY}` in its header is no such table") from error
