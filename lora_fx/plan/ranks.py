"""Ranks that are known only once the data has been looked at: `init = eva`."""

import math
from collections.abc import Mapping
from dataclasses import replace

from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.variants import tensors
from lora_fx.spec.expressions import Word


def with_ranks(plan: AdapterPlan, ranks: Mapping[str, int]) -> AdapterPlan:
    """Return the plan with these ranks of `eva` sites, by fqn; rank 0 is no site any more."""
    sites = (_with_rank(s, ranks[s.fqn]) if s.fqn in ranks else s for s in plan.sites)
    return replace(plan, sites=tuple(site for site in sites if site.rank))


def _with_rank(site: SitePlan, rank: int) -> SitePlan:
    """Return a site with another rank, and the scaling that its alpha then gives.

    With `adjust_scaling_factors` alpha follows the rank. A scaling that is a number stays.
    """
    adjusted = site.init.argument("adjust_scaling_factors") is True
    alpha = site.alpha * rank / site.rank if adjusted else site.alpha
    scaling = alpha / (math.sqrt(rank) if site.rslora else rank) if rank else 0.0
    if "scaling" in site.settings and not site.rslora and site.scaling != _standard(site):
        scaling = site.scaling
    new = replace(site, rank=rank, alpha=alpha, scaling=scaling, tensors={})
    return replace(new, tensors=tensors(new))


def _standard(site: SitePlan) -> float | None:
    """Return α/r where a setting of `scaling` asks for it."""
    is_word = site.settings["scaling"].value == Word("standard")
    return site.alpha / site.rank if is_word else None
