"""Merge adapters into many sites, those that a GPU's kernel takes in few launches."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.merged import weight_for
from lora_fx.kernels.merged_weights import Product, Sum, is_in_kernel, merged_weights
from lora_fx.runtime.merging.inputs import is_product
from lora_fx.runtime.merging.run import run

_AT_ONCE = 32  # sites; the GPU merges them while the host prepares the next


def run_together(
    sites: Sequence[Site], adapters: Sequence[str]
) -> Iterator[tuple[Site, dict[str, Tensor]]]:
    """Yield what `run` returns for each site, in any order."""
    others: list[Site] = []
    for start in range(0, len(sites), _AT_ONCE):
        some = sites[start : start + _AT_ONCE]
        results = _in_kernel(some, adapters)
        others += [site for site in some if site not in results]
        yield from results.items()
    for site in others:
        yield site, run(site, adapters)


@torch.no_grad()
def _in_kernel(sites: Sequence[Site], adapters: Sequence[str]) -> dict[Site, dict[str, Tensor]]:
    """Merge into the sites that the kernel takes; the others are left out."""
    results: dict[Site, dict[str, Tensor]] = {}
    sums: list[Sum] = []
    into: list[Tensor] = []
    for site in sites:
        weight = weight_for(site, adapters)
        here = [name for name in adapters if name in site.lora_branches]
        own = _in_kernel_all(_sums(site, weight, here)) if _is_weight_alone(site, here) else []
        if own:
            merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
            results[site] = {site.lora_place[1]: merged}
            sums += own
            into += merged.unbind() if _is_stack(site, weight) else (_matrix(merged),)
    if sums:
        merged_weights(sums, into)
    return results


def _in_kernel_all(sums: Iterable[Sum]) -> list[Sum]:
    """Return the sums if the kernel takes all of them, none otherwise."""
    found: list[Sum] = []
    for of in sums:
        if not is_in_kernel(of):
            return []
        found.append(of)
    return found


def _is_weight_alone(site: Site, adapters: Sequence[str]) -> bool:
    """Return whether all that changes is the weight, by products."""
    products = all(is_product(site, name) for name in adapters)
    biased = any(site.lora_branches[name].has_bias for name in adapters)
    return products and not biased


def _sums(site: Site, weight: Tensor, adapters: Sequence[str]) -> Iterator[Sum]:
    """Yield one sum for each matrix of the weight."""
    branches = [site.lora_branches[name] for name in adapters]
    scalings = [site.lora_arithmetic[name].scaling for name in adapters]
    factors = [(branch.A.weight, branch.B.weight) for branch in branches]
    if not _is_stack(site, weight):
        matrices = [(_matrix(A), _matrix(B)) for A, B in factors]
        yield _sum(_matrix(weight), matrices, scalings, site.lora_turned)
        return
    split = [site.split(A, B) for A, B in factors]  # type: ignore[attr-defined]
    for expert, matrix in enumerate(weight):
        own = [(A[expert], B[expert]) for A, B in split]
        yield _sum(matrix, own, scalings, site.lora_turned)


def _sum(
    weight: Tensor, factors: Sequence[tuple[Tensor, Tensor]], scalings: list[float], turned: bool
) -> Sum:
    if turned:
        factors = [(B.t(), A.t()) for A, B in factors]
    return Sum(weight, [Product(B, A, s) for (A, B), s in zip(factors, scalings, strict=True)])


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(1)


def _is_stack(site: Site, weight: Tensor) -> bool:
    return isinstance(site, ParameterSite) and weight.dim() > 2
