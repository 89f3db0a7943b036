"""What of a model decides what a PEFT config means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Selection:
    """The modules, or parameters, that a selector of the language selects.

    `complete` says that each of its patterns matches something, so that no `?` is needed.
    """

    names: frozenset[str]
    complete: bool


class Model(Protocol):
    """A model's names, and how the language reads selectors on it.

    `modules` and `parameters` are dotted names in module order, shared modules once. `aliases` maps
    every name of a module to that one. `linears` is what PEFT's `all-linear` adapts, `stacks` the
    lists of layers with their lengths. `tied` are the modules that share the weight of `embedding`,
    by which the tokens enter; `embeddings` are all embeddings, `attentions` all that are an
    `nn.MultiheadAttention`.
    """

    type: str | None
    modules: Sequence[str]
    parameters: Sequence[str]
    aliases: Mapping[str, str]
    linears: frozenset[str]
    embeddings: frozenset[str]
    attentions: frozenset[str]
    stacks: Mapping[str, int]
    embedding: str | None
    tied: frozenset[str]

    def select(self, selector: str) -> Selection | None:
        """Return what a selector selects; None if the language refuses it on this model."""
        ...
