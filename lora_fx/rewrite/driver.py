"""Apply rules to a graph: order, insertion points, use lists, metadata, provenance, counts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from lora_fx.rewrite.metadata import inherit
from lora_fx.rewrite.rule import Match, Miss, Rule


def apply(rules: Sequence[Rule], module: GraphModule) -> Counter[str]:
    """Apply each rule wherever it matches, in graph order, once per node; return counts by name.

    Bodies of higher-order operators (activation checkpointing) are graphs of their own and are
    rewritten too. New nodes get the matched node's place in the model's source, and in
    `meta["lora_fx"]` the names of the rules that led to them and the node's own provenance. The
    graph is linted and recompiled.
    """
    counts: Counter[str] = Counter()
    for part in graph_modules(module):
        for rule in rules:
            for node in list(part.graph.nodes):
                match = rule.match(node)
                if isinstance(match, Match):
                    _replace(part.graph, rule, match)
                    counts[rule.name] += 1
        part.graph.lint()
        part.recompile()
    return counts


def misses(rules: Sequence[Rule], module: GraphModule) -> list[tuple[Node, str, str]]:
    """Return (node, rule name, reason) for every refusal, changing nothing."""
    refused = []
    for part in graph_modules(module):
        for node in part.graph.nodes:
            for rule in rules:
                outcome = rule.match(node)
                if isinstance(outcome, Miss):
                    refused.append((node, rule.name, outcome.reason))
    return refused


def graph_modules(module: GraphModule) -> Iterator[GraphModule]:
    """Yield the module and the bodies of its higher-order operators."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            yield part


def _replace(graph: Graph, rule: Rule, match: Match) -> None:
    before = set(graph.nodes)
    with graph.inserting_before(match.node):
        value = rule.rewrite(graph, match)
    made = [node for node in graph.nodes if node not in before]
    known: dict[str, Any] = match.node.meta.get("lora_fx", {})
    steps = [known["rule"], rule.name] if "rule" in known else [rule.name]
    provenance = {**known, "rule": "/".join(steps)}
    for node in made:
        inherit(node, match.node)
        node.meta["lora_fx"] = provenance
    match.node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in made)
    graph.erase_node(match.node)
