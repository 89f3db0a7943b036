"""What a `.lora` file means: names looked up, presets expanded, constants in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_fx.diagnostics import Source, Span
from lora_fx.spec.expressions import Expr
from lora_fx.spec.selectors import Range, Selector


@dataclass(frozen=True)
class ModelRef:
    """The model that the spec is for: a folder, a `config.json` or a hub id."""

    path: str
    dtype: str | None
    revision: str | None
    trust_remote_code: bool
    span: Span


@dataclass(frozen=True)
class Replication:
    """The new stack of layers: these ranges of the old one, in this order."""

    ranges: tuple[Range, ...]
    span: Span


@dataclass(frozen=True)
class Setting:
    """A value that an attribute is given; may depend on the module, so it is kept as written.

    `origin` names the rule: `adapter default`, `preset attention`, `target q_proj, v_proj`.
    """

    value: Expr
    span: Span
    origin: str


@dataclass(frozen=True)
class Target:
    """A rule: adapt what the selector matches, with these settings over the adapter's own."""

    selector: Selector
    settings: Mapping[str, Setting]
    optional: bool
    span: Span


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter; `settings` hold where no target says otherwise."""

    name: str
    span: Span
    settings: Mapping[str, Setting]
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Check:
    """A condition on the plan."""

    condition: Expr
    message: str | None
    span: Span


@dataclass(frozen=True)
class CompileSpec:
    """How the adapted model is compiled."""

    mode: str = "default"
    dynamic: bool | None = None
    unit: Literal["layers", "model"] = "layers"
    checkpoint: Literal["none", "layers"] = "none"
    span: Span | None = None


@dataclass(frozen=True)
class Spec:
    """A whole file, checked; `path` is None if it was given as text."""

    source: Source
    path: Path | None
    model: ModelRef | None
    replication: Replication | None
    adapters: tuple[AdapterSpec, ...]
    checks: tuple[Check, ...]
    compile: CompileSpec
