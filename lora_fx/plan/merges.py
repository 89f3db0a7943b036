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

    All methods but `cat` and those by an SVD sum A and B by themselves, so that the ranks at a site
    must be one (PEFT's `add_weighted_adapter`). `merges` come each after those it takes from.
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
            site.rank,
            site.layer,
            site.settings["rank"].span if "rank" in site.settings else site.rule,
        )
        for site in adapter.sites
    }


def _any_ranks(merge: MergeSpec) -> bool:
    return merge.method.name == "cat" or merge.method.name.endswith("svd")


def _different(merge: MergeSpec, parts: _Parts) -> Iterator[Diagnostic]:
    for site, here in parts.items():
        if _any_ranks(merge) or len({part.rank for part in here}) == 1:
            continue
        yield Diagnostic(
            "cannot-apply",
            f"method `{merge.method.name}` merges adapters of one rank",
            merge.span,
            f"{' and '.join(f'`{part.term}` has {part.rank}' for part in here)} at `{site}`",
            tuple((part.span, f"`{part.term}` has rank {part.rank}") for part in here),
            help="write `method = cat` or `method = svd`, which merge any ranks",
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
    """Return what comes out at a site: the sum of the ranks, or by an SVD the largest of them."""
    ranks = [part.rank for part in here]
    rank = merge.rank or (sum(ranks) if merge.method.name == "cat" else max(ranks))
    return _Part(merge.name, rank, here[0].layer, merge.span)
