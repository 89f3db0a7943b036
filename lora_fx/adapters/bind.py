"""Put a plan's adapters into a module tree."""

import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.init import initialise
from lora_fx.adapters.site import Arithmetic
from lora_fx.plan.sites import SitePlan


def bind(model: nn.Module, planned: tuple[SitePlan, ...]) -> None:
    """Mark every planned site, in place, with freshly initialised adapters; none is active."""
    for site_plan in planned:
        site = storage.mark(model.get_submodule(site_plan.fqn))  # type: ignore[arg-type]
        device = storage.base_device(site)
        A, B = initialise(
            site_plan.init.name,
            site_plan.in_features,
            site_plan.out_features,
            site_plan.rank,
            site_plan.seed,
            site_plan.adapter,
            site_plan.fqn,
        )
        dtype = getattr(torch, site_plan.dtype)
        tensors = {
            "lora_A.weight": A.to(device, dtype),
            "lora_B.weight": B.to(device, dtype),
        }
        storage.insert(site, site_plan.adapter, tensors, arithmetic(site_plan), site_plan.trainable)


def arithmetic(site_plan: SitePlan) -> Arithmetic:
    """Return what the plan says about how a branch computes."""
    return Arithmetic(
        site_plan.alpha, site_plan.scaling, site_plan.rslora, site_plan.dropout, site_plan.compute
    )


def activate(model: nn.Module, adapters: tuple[str, ...]) -> None:
    """Let exactly these adapters take part in the forward, at every site that has them."""
    for _, site in storage.sites(model):
        site.activate(adapters)
