"""What a rule is: it matches a node or says why not, and builds the node that replaces it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.fx import Graph, Node


@dataclass(frozen=True)
class Match:
    """A node a rule applies to, with what the rule found out about it."""

    node: Node
    found: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.found[name]


@dataclass(frozen=True)
class Miss:
    """Why a rule does not apply at a node; falsy."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Rule(Protocol):
    """Matching and rewriting are apart; the driver inserts, reconnects, annotates and counts.

    `rewrite` builds new nodes with `metadata.call` and returns the one that takes the matched
    node's place. It touches no use lists.
    """

    @property
    def name(self) -> str:
        """The rule's name in graph texts."""
        ...

    def match(self, node: Node) -> Match | Miss:
        """Say whether the rule applies at `node`."""
        ...

    def rewrite(self, graph: Graph, match: Match) -> Node:
        """Build the replacement."""
        ...
