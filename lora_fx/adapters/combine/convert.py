"""One adapter of whatever kind as a plain LoRA one, at a rank of its own."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.combine.combine import Combined, of_base, plan_of, site_of
from lora_fx.adapters.combine.low_rank import LowRank, Rank, low_rank
from lora_fx.adapters.sites.magnitudes import effective_delta, oriented_weight
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.exact import exact_products
from lora_fx.plan.alike import once_each
from lora_fx.plan.folding import numberless
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan

Adjust = Callable[[Tensor, Tensor], Tensor]  # of the base's weight and its change, (out, in)
_KINDS = ("linear", "transposed", "embedding", "conv", "attention")


@torch.no_grad()
@exact_products()
def converted(
    model: nn.Module, plan: AdapterPlan, name: str, rank: Rank | None, adjust: Adjust | None = None
) -> tuple[Combined, dict[str, float]]:
    """Return an adapter's changes of the base's weights as a new one, and the error at each site.

    The scaling of the new one is 1; without `rank` it has the ranks that the adapter has. What
    `adjust` makes of a change is converted. The model is only looked at. Raises LoraFxError naming
    what is no change of the base's own weight.
    """
    faults = list(_faults(plan, adjust is None))
    if faults:
        raise LoraFxError(once_each(faults))
    placed, found = dict(storage.sites(model)), {}
    for site in plan.sites:
        here = placed[site.name]
        delta = change_of(here, plan.name)
        if adjust is not None:
            delta = adjust(weight_of(here).to(delta), delta)
        found[site.name] = low_rank(delta, rank or site.rank, site.layer.groups)
    values = {s.name: _values(placed[s.name], s, found[s.name]) for s in plan.sites}
    sites = tuple(site_of(name, site, values[site.name]) for site in plan.sites)
    new = plan_of(name, sites, [(plan, 1.0)])
    combined = Combined(new, values, *of_base(model, new, {plan.name: 1.0}))
    return combined, {where: one.error for where, one in found.items()}


def change_of(site: storage.Site, adapter: str) -> Tensor:
    """Return what an adapter does to the base's own weight (out, in).

    Of a convolution with groups, what the outputs of each group do with all inputs.
    """
    groups = getattr(site, "groups", 1)
    if groups > 1:
        A, B = (f.flatten(1).chunk(groups) for f in site.lora_branches[adapter].product())
        products = [b @ a for a, b in zip(A, B, strict=True)]
        return site.lora_arithmetic[adapter].scaling * torch.cat(products)
    delta, change = effective_delta(site, adapter), site.lora_change
    if change is None or change.adapter != adapter:
        return delta
    return delta - _taken(site).to(delta)


def weight_of(site: storage.Site) -> Tensor:
    """Return the base's own weight (out, in), whatever an adapter took out of it."""
    weight = oriented_weight(site)
    return weight if site.lora_change is None else weight + _taken(site).to(weight)


def _taken(site: storage.Site) -> Tensor:
    assert site.lora_change is not None
    A, B = (f.weight.flatten(1) for f in (site.lora_change.factors.A, site.lora_change.factors.B))
    return site.lora_change.arithmetic.scaling * (B @ A)


def _values(site: storage.Site, planned: SitePlan, found: LowRank) -> dict[str, Tensor]:
    first, second = list(planned.tensors)[:2]
    shapes = planned.layer.shapes(len(found.A))
    values = {first: found.A.reshape(shapes[first]), second: found.B.reshape(shapes[second])}
    bias = site.lora_branches[planned.adapter].B.bias
    if bias is not None:
        values["lora_B.bias"] = site.lora_arithmetic[planned.adapter].scaling * bias.detach()
    return values


def _faults(plan: AdapterPlan, groups: bool) -> Iterator[Diagnostic]:
    for site in plan.sites:
        where = numberless(site.name)
        if site.layer.kind not in _KINDS or (site.layer.groups > 1 and not groups):
            yield Diagnostic("cannot-convert", f"`{where}` is no matrix that has one change")
        if site.variant.name == "alora":
            message = (
                f"`{plan.name}` is `alora` at `{where}`, and changes the weight for some tokens"
            )
            yield Diagnostic("cannot-convert", message)
        if site.replaces_base:
            message = f"`{plan.name}` has put another weight at `{where}`, and adds to that"
            help = "make it active and call `merge_and_unload`"
            yield Diagnostic("cannot-convert", message, help=help)
