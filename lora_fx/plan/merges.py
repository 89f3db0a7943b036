"""The ranks of merges: which adapters can be merged by which method, and what comes out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.kinds import Layer
from lora_fx.plan.rules import AdapterPlan
from lora_fx.spec.spec import MergeSpec


@dataclass(frozen=True)
class _Part:
    """What one term of a mix has at a site; `span` is what sets its rank."""

    term: str
    rank: int
    layer: Layer
    span: Span


_Parts = Mapping[str, Sequence[_Part]]


def merge_faults(merges: Sequence[MergeSpec], adapters: Sequence[AdapterPlan]) -> list[Diagnostic]:
    """Refuse ranks that a method cannot merge, and those that no layer has room for.

    Methods that sum A and B by themselves need one rank at a site (PEFT's `add_weighted_adapter`);
    the others are of the products B A. `merges` come each after those it takes from.
    """
    ranks = {adapter.name: _of_adapter(adapter) for adapter in adapters}
    faults: list[Diagnostic] = []
    for merge in merges:
        parts: dict[str, list[_Part]] = {}
        for term in merge.mix.terms:
            for site, part in ranks.get(term.name, {}).items():
                parts.setdefault(site, []).append(part)
        faults += once_each([*_different(merge, parts), *_too_large(merge, parts)])
        ranks[merge.name] = {site: _merged(merge, here) for site, here in parts.items()}
    return faults


def _of_adapter(adapter: AdapterPlan) -> dict[str, _Part]:
    return {
        site.name: _Part(
            adapter.name,
            site.rank_of_change,
            site.layer,
            site.settings["rank"].span if "rank" in site.settings else site.rule,
        )
        for site in adapter.sites
    }


def _any_ranks(merge: MergeSpec) -> bool:
    name = merge.method.name
    exact = name == "linear" and not merge.method.argument("cross_terms")
    return exact or name == "cat" or name.endswith("svd")


def _different(merge: MergeSpec, parts: _Parts) -> Iterator[Diagnostic]:
    for site, here in parts.items():
        if _any_ranks(merge) or len({part.rank for part in here}) == 1:
            continue
        terms = " with `cross_terms`" if merge.method.name == "linear" else ""
        yield Diagnostic(
            "cannot-apply",
            f"method `{merge.method.name}`{terms} merges adapters of one rank",
            merge.span,
            f"{' and '.join(f'`{part.term}` has {part.rank}' for part in here)} at `{site}`",
            tuple((part.span, f"`{part.term}` has rank {part.rank}") for part in here),
            help="`linear`, `cat` and `svd` merge any ranks",
        )


def _too_large(merge: MergeSpec, parts: _Parts) -> Iterator[Diagnostic]:
    for site, here in parts.items():
        largest = here[0].layer.largest_rank
        if merge.rank is not None and merge.rank > largest:
            message = f"rank {merge.rank} is larger than the layer allows"
            yield Diagnostic(
                "rank-too-large", message, merge.span, f"at most {largest} at `{site}`"
            )
        elif merge.rank is not None and merge.rank % here[0].layer.groups:
            groups = here[0].layer.groups
            message = f"the rank must be a multiple of the {groups} groups"
            label = f"is {merge.rank} at `{site}`"
            yield Diagnostic("cannot-apply", message, merge.span, label)


def _merged(merge: MergeSpec, here: Sequence[_Part]) -> _Part:
    """Return what comes out at a site: the sum of the ranks, or by an SVD the largest of them.

    `linear` needs no more of the sum than the layer has room for.
    """
    ranks, layer = [part.rank for part in here], here[0].layer
    rank = max(ranks)
    if merge.method.name == "cat":
        rank = sum(ranks)
    elif merge.method.name == "linear" and _any_ranks(merge):
        rank = min(sum(ranks), layer.largest_rank)
    return _Part(merge.name, merge.rank or rank, layer, merge.span)
