"""Merge adapters into the weight of one site, by its program or, where it has none, densely."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lora_fx.adapters.sites.magnitudes import effective_delta
from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.merged import source, weight_for
from lora_fx.graph.exact import exact_products
from lora_fx.runtime.merging.inputs import MergeInputs, is_product
from lora_fx.runtime.merging.program import lowered

_LARGE = 1 << 20  # elements of a weight of which a CPU merges some rows at a time:
_AT_ONCE = 1 << 18  # so many, whose float32 sum stays in its cache


@torch.no_grad()
@exact_products()
def run(site: Site, adapters: Sequence[str], weight: Tensor | None = None) -> dict[str, Tensor]:
    """Return what a site's tensors are with these adapters merged into them, by name.

    With `weight` given, that is merged into instead of the site's own.
    """
    if not all(is_product(site, name) for name in adapters if name in site.lora_branches):
        return _dense(site, adapters, weight)
    name = site.lora_place[1]
    inputs = MergeInputs.of(site, adapters, weight)
    if isinstance(site, ParameterSite) and inputs.weight.ndim > 2:
        merged = torch.empty_like(inputs.weight)
        for expert, weight in enumerate(inputs.weight):
            (merged[expert],) = _run(inputs.of_expert(site, expert, weight))
        return {name: merged}
    return dict(zip((name, "bias"), _run(inputs), strict=False))


@torch.no_grad()
@exact_products()
def run_expert(site: ParameterSite, adapters: Sequence[str], weight: Tensor, expert: int) -> Tensor:
    """Return what the weight of one expert in a stack is with these adapters merged into it."""
    (merged,) = _run(MergeInputs.of(site, adapters, weight).of_expert(site, expert, weight))
    return merged


@torch.no_grad()
@exact_products()
def run_rows(site: Site, adapters: Sequence[str], rows: Tensor, start: int) -> Tensor:
    """Return what some rows of a weight that `has_rows` are with these adapters merged into it.

    It may be `rows` themselves, written over.
    """
    (merged,) = _run(MergeInputs.of(site, adapters, rows).of_rows(start, rows), rows)
    return merged


@torch.no_grad()
def has_rows(site: Site, adapter: str) -> bool:
    """Return whether an adapter can be merged into some rows of a site's weight by themselves."""
    return is_product(site, adapter) and MergeInputs.of(site, (adapter,)).has_rows


def _run(inputs: MergeInputs, into: Tensor | None = None) -> Sequence[Tensor]:
    """Run the program of a site; it may write into the weight itself."""
    weight = inputs.weight
    on_cpu = type(weight) is Tensor and weight.device.type == "cpu"  # of no rows, if sharded
    if not on_cpu or not inputs.has_rows or weight.numel() <= _LARGE:
        return _program(inputs)
    merged = torch.empty_like(weight) if into is None else into
    step = max(1, _AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        (merged[start : start + step],) = _program(inputs.of_rows(start, weight[start:][:step]))
    return (merged,)


def _program(inputs: MergeInputs) -> Sequence[Tensor]:
    tensors = inputs.tensors()
    signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    return lowered(inputs.structure, signature)(*tensors)


def _dense(site: Site, adapters: Sequence[str], weight: Tensor | None) -> dict[str, Tensor]:
    """Merge adapters whose deltas are no products: W + Σ of what each alone adds to W (DoRA).

    W is what they are merged into: where one of them trains the weight, norms are of its own.
    """
    given = weight_for(site, adapters) if weight is None else weight
    here = [name for name in adapters if name in site.lora_branches]
    W = given.detach().t() if site.lora_turned else given.detach().flatten(1)
    deltas = [effective_delta(site, name, W) for name in here]
    wide = reduce(torch.promote_types, (given.dtype, *(delta.dtype for delta in deltas)))
    total = sum(deltas[1:], deltas[0]).to(wide)
    delta = total.t() if site.lora_turned else total.view(given.shape)
    results = {site.lora_place[1]: given.to(wide) + delta}
    biased = [name for name in here if site.lora_branches[name].has_bias]
    if biased:
        results["bias"] = source(site, "bias", adapters).to(wide)
        for name in biased:
            bias = site.lora_branches[name].B.bias
            assert bias is not None
            results["bias"] = results["bias"] + site.lora_arithmetic[name].scaling * bias
    return {name: tensor.to(given.dtype) for name, tensor in results.items()}
