"""What one adapter does at one module: every attribute, and the line that set it."""

from collections.abc import Mapping
from dataclasses import dataclass

from lora_fx.diagnostics import Span


@dataclass(frozen=True)
class SitePlan:
    """One (module, adapter) pair.

    `scaling` is the number that multiplies B A x: α/r, α/√r (`rslora`), or the one given. `rule`
    is the last target that matched; `provenance` maps each attribute that is not at its default
    to where it was set.
    """

    fqn: str
    adapter: str
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scaling: float
    rslora: bool
    dropout: float
    init: str
    seed: int
    dtype: str
    compute: str
    trainable: bool
    rule: Span
    provenance: Mapping[str, Span]

    @property
    def parameters(self) -> int:
        """Elements of A and B."""
        return self.rank * (self.in_features + self.out_features)
