"""An adapter added to a tensor of a checkpoint, or to the part of a tensor that is stored there."""

import torch
from torch import Tensor

from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.runtime.merging.inputs import is_product
from lora_fx.runtime.merging.run import run, run_expert
from lora_fx.runtime.streamed.stored_names import Part


def can_add_to_part(site: Site, adapter: str, part: Part) -> bool:
    """Return whether what an adapter adds to a part of a weight needs that part alone.

    Norms need all of a weight, and a part has to lie within one expert.
    """
    return is_product(site, adapter) and part.within(_block(site)) is not None


@torch.no_grad()
def with_delta(site: Site, name: str, adapter: str, values: Tensor, part: Part | None) -> Tensor:
    """Return the weight or bias of a site, or a part of it, with an adapter added, in its dtype."""
    if name == "bias":
        bias, scaling = site.lora_branches[adapter].B.bias, site.lora_arithmetic[adapter].scaling
        assert bias is not None
        bias = bias if part is None else part.of(bias)
        wide = torch.promote_types(values.dtype, bias.dtype)
        return (values.to(wide) + scaling * bias.to(wide)).to(values.dtype)
    if part is None:
        return run(site, (adapter,), values)[name]
    place = part.within(_block(site))
    assert place is not None
    expert, within = place
    weight = torch.zeros(_shape(site), dtype=values.dtype)
    within.of(weight).copy_(values)
    if isinstance(site, ParameterSite) and site.weight.ndim > 2:
        return within.of(run_expert(site, (adapter,), weight, expert))
    return within.of(run(site, (adapter,), weight)[name])


def _shape(site: Site) -> torch.Size:
    """Return the shape of what is merged at a time: the matrix of one expert, or all the weight."""
    one_by_one = isinstance(site, ParameterSite) and site.weight.ndim > 2
    return site.weight.shape[1:] if one_by_one else site.weight.shape


def _block(site: Site) -> int:
    return _shape(site).numel()
