"""Why adapters cannot be combined."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from lora_fx.adapters import token_rows
from lora_fx.adapters.combine.factors import (
    merges_any_ranks,
    rank_of,
)
from lora_fx.adapters.combine.gains import LEAST, common_gain
from lora_fx.adapters.combine.part import Part
from lora_fx.adapters.combine.recipe import Recipe
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic
from lora_fx.plan.folding import numberless
from lora_fx.plan.sites import SitePlan

_SUMS = ("lora", "dora", "bdlora", "velora", "kasa", "monteclora")


def of_branches(found: Sequence[tuple[SitePlan, float]], recipe: Recipe) -> Iterator[Diagnostic]:
    """Yield why branches of one site cannot be combined."""
    first, method = found[0][0], recipe.method
    where = numberless(first.name)
    for site, _ in found:
        if site.variant.name not in _SUMS:
            message = f"`{site.adapter}` is `{site.variant.name}` at `{where}`, which is no sum"
            yield Diagnostic("cannot-combine", message)
        if site.replaces_base:
            message = f"`{site.adapter}` has put another weight at `{where}`, and adds to that"
            help = "make it active and call `merge_and_unload`"
            yield Diagnostic("cannot-combine", message, help=help)
    ranks, most = [site.rank_of_change for site, _ in found], first.layer.largest_rank
    groups = first.layer.groups
    each = min(most, first.layer.out_features // groups)
    rank = recipe.rank or groups * rank_of(method, [r // groups for r in ranks], None, each)
    if len(set(ranks)) > 1 and not merges_any_ranks(method):
        listed = " and ".join(str(rank) for rank in dict.fromkeys(ranks))
        message = f"`{method.name}` combines adapters of one rank; at `{where}` they have {listed}"
        help = "`linear`, `cat` and `svd` combine any ranks"
        yield Diagnostic("cannot-combine", message, help=help)
    elif recipe.bounded and rank > most:
        message = f"the result would have rank {rank} at `{where}`, where at most {most} is needed"
        yield Diagnostic("cannot-combine", message, help=f"compress it to at most {most} by `svd`")
    elif rank % groups:
        message = f"the result would have rank {rank} at `{where}`, which has {groups} groups"
        help = f"compress it to a multiple of {groups} by `svd`"
        yield Diagnostic("cannot-combine", message, help=help)
    if len({site.tie for site, _ in found}) > 1:
        message = f"one adapter is tied at `{where}` and another is not"
        yield Diagnostic("cannot-combine", message)


def dora_and_biased(sites: Iterable[SitePlan]) -> Iterator[Diagnostic]:
    """Yield a fault if one adapter has magnitudes and another biases on B."""
    named = {one: site.adapter for site in sites for one in (site.variant.name, site.lora_bias)}
    if "dora" in named and True in named:
        message = f"`{named['dora']}` is `dora`, and `{named[True]}` has `lora_bias`"
        yield Diagnostic("cannot-combine", message, help="no adapter can have both")


def replaced_and_adapted(
    model: nn.Module, sites: Mapping[str, object], weights: Mapping[str, float]
) -> Iterator[Diagnostic]:
    """Yield a fault where one adapter adds to what another has a version of its own of."""
    for fqn, module in copies.holders(model):
        for adapter in weights:
            own = copies.tensors(module, adapter) if copies.has(module, adapter) else {}
            rows = any(token_rows.rows_of(module, other) for other in weights)
            adapts = (fqn in sites or rows) if "weight" in own else False
            if adapts or any(f"{fqn}.{name}" in sites for name in own):
                message = f"`{adapter}` trains `{numberless(fqn)}`, and another adapter adapts it"
                help = "combine adapters that train and adapt the same modules"
                yield Diagnostic("cannot-combine", message, help=help)


def vanishing(fqn: str, parts: Sequence[Part]) -> Iterator[Diagnostic]:
    """Yield a fault if the weights of DoRA adapters leave nothing of the base's weight."""
    c = common_gain(parts)
    if c is not None and c.abs().min() < LEAST:
        message = f"these weights leave nothing of the base's weight at `{numberless(fqn)}`"
        help = "a DoRA adapter scales that weight: choose weights that leave some of it"
        yield Diagnostic("cannot-combine", message, help=help)
