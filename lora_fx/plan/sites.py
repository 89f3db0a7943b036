"""What one adapter does at one module: every attribute, and the line that set it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_fx.diagnostics import Span
from lora_fx.plan.kinds import Layer
from lora_fx.spec.expressions import Word
from lora_fx.spec.spec import Setting

TAKES_FROM_BASE = frozenset({"pissa", "olora", "corda", "lora_ga"})
CHANGES_BASE = TAKES_FROM_BASE | {"loftq"}
LOOKS_AT_BASE = CHANGES_BASE | {"mica"}


@dataclass(frozen=True)
class SitePlan:
    """One (module, adapter) pair, or with `parameter` one of a module's parameters.

    `scaling` is the number that multiplies B A x: α/r, α/√r (`rslora`), or the one given. `tensors`
    are the shapes of the adapter's parameters by PEFT's names, `frozen` those that are not trained.
    `rule` is the last target that matched; `settings` maps each attribute that is not at its
    default to what set it.
    """

    fqn: str
    parameter: str | None
    layer: Layer
    adapter: str
    rank: int
    alpha: float
    scaling: float
    rslora: bool
    dropout: float
    init: Word
    variant: Word
    lora_bias: bool
    tie: bool
    offload: bool
    seed: int
    dtype: str
    compute: str
    trainable: bool
    tensors: Mapping[str, tuple[int, ...]]
    frozen: frozenset[str]
    rule: Span
    settings: Mapping[str, Setting]

    @property
    def name(self) -> str:
        """The dotted name of what is adapted: the module's, or the parameter's."""
        return self.fqn if self.parameter is None else f"{self.fqn}.{self.parameter}".lstrip(".")

    @property
    def weight(self) -> str:
        """The name of the weight in its module."""
        return self.parameter or "weight"

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is adapted for itself, and not as one of a module's."""
        return self.parameter is not None and self.layer.kind != "attention"

    @property
    def target(self) -> str:
        """The name by which it is selected: of a matrix of an attention, the attention's."""
        if self.layer.kind != "attention":
            return self.name
        return self.fqn if self.parameter is not None else self.fqn.rpartition(".")[0]

    @property
    def in_features(self) -> int:
        """Inputs of the adapted layer."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Outputs of the adapted layer."""
        return self.layer.out_features

    @property
    def changes_base(self) -> bool:
        """Whether the init, or KaSA, changes the base weight."""
        return self.init.name in CHANGES_BASE or self.variant.name == "kasa"

    @property
    def takes_from_base(self) -> bool:
        """Whether what the init changes of the base weight is what the adapter starts with."""
        return self.init.name in TAKES_FROM_BASE

    @property
    def rank_of_change(self) -> int:
        """The rank of all that the adapter does to the base's own weight."""
        return 2 * self.rank if self.changes_base and not self.replaces_base else self.rank

    @property
    def replaces_base(self) -> bool:
        """Whether the init puts another weight in the place of the base's."""
        return self.init.name in CHANGES_BASE - TAKES_FROM_BASE

    @property
    def kept(self) -> int:
        """Elements of A and B as they started, which are kept where the init changes the base."""
        shapes = self.layer.shapes(self.rank).values() if self.changes_base else ()
        return sum(math.prod(shape) for shape in shapes)

    @property
    def provenance(self) -> Mapping[str, Span]:
        """Where each attribute that is not at its default was set."""
        return {name: setting.span for name, setting in self.settings.items()}

    @property
    def parameters(self) -> int:
        """Elements of the adapter's parameters."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def trained(self) -> int:
        """Elements that training changes."""
        return sum(math.prod(self.tensors[name]) for name in self.trained_tensors)

    @property
    def trained_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that training changes."""
        return tuple(n for n in self.tensors if self.trainable and n not in self.frozen)
