"""The `merge` statements of a spec, carried out on a tree whose adapters with weights are bound."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.bind import activate, remove
from lora_fx.adapters.combine.combine import Combined, combined
from lora_fx.adapters.combine.operators import Method
from lora_fx.adapters.combine.recipe import Recipe
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.mergeable import require_mergeable
from lora_fx.plan.merge_sources import base_sources
from lora_fx.plan.rules import AdapterPlan
from lora_fx.runtime.merging.tensors import merged_tensors, require_finite
from lora_fx.runtime.quantization_config import announce_plain
from lora_fx.runtime.unload import put_for_good, unpack_for_good, untie, with_rows
from lora_fx.spec.spec import MergeSpec, Spec

Adapters = Mapping[str, AdapterPlan]


def run_merges(tree: nn.Module, spec: Spec, adapters: Adapters) -> Adapters:
    """Carry out every merge, in place; return the adapters that there are afterwards, by name.

    First adapters are made, then what goes into the base does: the adapters that it came from are
    gone then. Raises LoraFxError for what cannot be combined or merged.
    """
    there = combine_statements(tree, spec, adapters)
    for merge in spec.merges:
        if merge.into_base:
            _into_base(tree, merge.name)
    for name in base_sources(spec):
        remove(tree, name)
        del there[name]
    return there


def combine_statements(tree: nn.Module, spec: Spec, adapters: Adapters) -> dict[str, AdapterPlan]:
    """Add an adapter for each merge, what goes into the base too, in place; return all by name."""
    there = dict(adapters)
    for merge in spec.merges:
        new = _combine(tree, merge, there)
        new.bind(tree)
        there[merge.name] = new.plan
    for merge in spec.merges:
        if merge.into_base:
            require_mergeable(tree, (merge.name,), merge.dequantize)
    return there


def _combine(tree: nn.Module, merge: MergeSpec, adapters: Adapters) -> Combined:
    arguments: dict[str, Any] = dict(merge.method.arguments)
    sign = arguments["sign"].name if "sign" in arguments else "total"
    cross_terms = arguments.get("cross_terms", False)
    method = Method(merge.method.name, arguments.get("density", 1.0), sign, cross_terms)
    mix = [(adapters[term.name], term.weight) for term in merge.mix.terms]
    dtype = getattr(torch, merge.dtype) if merge.dtype and not merge.into_base else None
    recipe = Recipe(method, merge.rank, dtype=dtype, bounded=not merge.into_base)
    return combined(tree, merge.name, mix, recipe)


def _into_base(tree: nn.Module, name: str) -> None:
    """Make what one adapter computes the base's, in place."""
    activate(tree, (name,))
    results = merged_tensors(tree, (name,))
    require_finite(tree, results)
    unpack_for_good(results)
    put_for_good(results)
    put_for_good(with_rows(tree, (name,)))
    for _, holder in copies.holders(tree):
        copies.replace_base(holder)
    activate(tree, ())
    untie(tree)
    announce_plain(tree)
