"""What a `.lora` file means: names looked up, presets expanded, constants in place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_fx.diagnostics import Source, Span
from lora_fx.spec.expressions import Expr, Word
from lora_fx.spec.json_form.write import file_to_json
from lora_fx.spec.moved import moved_paths
from lora_fx.spec.selectors import Atom, Range, Selector
from lora_fx.spec.syntax import File


@dataclass(frozen=True)
class ModelRef:
    """The model that the spec is for: a folder, a `config.json` or a hub id."""

    path: str
    dtype: str | None
    revision: str | None
    trust_remote_code: bool
    span: Span


@dataclass(frozen=True)
class LayersSpec:
    """The new stack of layers: these ranges of the old one, in this order, without the dropped.

    All numbers are those of the old stack; no ranges are all of it. `stack` names it where there
    are several. With `share` the copies of a layer share its base weights.
    """

    ranges: tuple[Range, ...]
    dropped: tuple[Range, ...]
    stack: str | None
    share: bool
    span: Span


@dataclass(frozen=True)
class QuantizeSpec:
    """Modules whose base weights are quantised, and how: `nf4(…)`, `fp4(…)`, `int8(…)`."""

    selector: Selector
    method: Word
    storage: str
    span: Span


@dataclass(frozen=True)
class Setting:
    """A value that an attribute is given; may depend on the module, so it is kept as written.

    `origin` names the rule: `adapter default`, `preset attention`, `target q_proj, v_proj`; `over`
    is the setting that would hold without this one.
    """

    value: Expr
    span: Span
    origin: str
    over: "Setting | None" = None


@dataclass(frozen=True)
class Target:
    """A rule: adapt what the selector matches, with these settings over the adapter's own."""

    selector: Selector
    settings: Mapping[str, Setting]
    optional: bool
    span: Span


@dataclass(frozen=True)
class Train:
    """Modules of which a full copy is trained."""

    selector: Selector
    optional: bool
    span: Span


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that are trained; without an atom, of the input embedding."""

    ids: tuple[int, ...]
    atom: Atom | None
    span: Span


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter; `settings` hold where no target says otherwise."""

    name: str
    span: Span
    settings: Mapping[str, Setting]
    targets: tuple[Target, ...]
    trains: tuple[Train, ...]
    tokens: tuple[Tokens, ...]


@dataclass(frozen=True)
class Term:
    """An adapter, or a merge, and its weight in a mix."""

    name: str
    weight: float
    span: Span


@dataclass(frozen=True)
class Mix:
    """A weighted sum of adapters; without terms, the base."""

    terms: tuple[Term, ...]
    span: Span


@dataclass(frozen=True)
class ArrowSpec:
    """How each token is routed among the active adapters (Ostapenko et al. 2024, 2405.11157).

    It gets at most `top` of them, by a softmax at this `temperature`; of each the mean of the
    adapters in `general` is subtracted.
    """

    top: int
    temperature: float
    general: tuple[str, ...]
    span: Span


@dataclass(frozen=True)
class RouteSpec:
    """Which adapter each sample of a batch gets, or with `arrow` each token.

    `argument` is the keyword of `forward` and `generate`; `mixes` are the names beside those of
    adapters; `default` is what a call without names gets.
    """

    argument: str
    slots: int | None
    max_rank: int | None
    train: bool
    mixes: Mapping[str, Mix]
    default: Mix | None
    span: Span
    arrow: ArrowSpec | None = None


@dataclass(frozen=True)
class MergeSpec:
    """Adapters combined into one called `name`, or folded into the base (`into_base`).

    `rank` is what the result is compressed to, `save` a folder; None leaves either out.
    """

    name: str
    mix: Mix
    method: Word
    rank: int | None
    into_base: bool
    dequantize: bool
    save: str | None
    dtype: str | None
    span: Span


@dataclass(frozen=True)
class OptimizerSpec:
    """What `lora_fx.optimizer` makes; None is the optimizer's own default.

    `loraplus_ratio` is the learning rate of B over that of A (Hayou et al. 2024, LoRA+,
    arXiv 2402.12354, §1).
    """

    name: str
    lr: float
    loraplus_ratio: float | None
    weight_decay: float
    embedding_lr: float | None
    betas: tuple[float, float] | None
    eps: float | None
    momentum: float | None
    span: Span


@dataclass(frozen=True)
class Check:
    """A condition on the plan."""

    condition: Expr
    message: str | None
    span: Span


@dataclass(frozen=True)
class EntrySpec:
    """A program to compile ahead, and the sizes it is compiled for: samples and tokens."""

    name: str
    batch: int
    sequence: int
    span: Span


@dataclass(frozen=True)
class CompileSpec:
    """How the adapted model is compiled; `budget` is the share of activations that is kept."""

    mode: str = "default"
    dynamic: bool | None = None
    unit: Literal["layers", "model"] = "layers"
    checkpoint: Literal["none", "layers", "budget"] = "none"
    budget: float | None = None
    layout: Literal["auto", "plain", "augmented"] = "auto"
    entries: tuple[EntrySpec, ...] = ()
    span: Span | None = None


@dataclass(frozen=True)
class Spec:
    """A whole file, checked; `path` is None if it was given as text.

    `syntax` is what was written, included files in place.
    """

    source: Source
    path: Path | None
    syntax: File
    model: ModelRef | None
    layers: LayersSpec | None
    quantize: tuple[QuantizeSpec, ...]
    adapters: tuple[AdapterSpec, ...]
    route: RouteSpec | None
    merges: tuple[MergeSpec, ...]
    optimizer: OptimizerSpec | None
    checks: tuple[Check, ...]
    compile: CompileSpec

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain data, which `lora_fx.parse` reads as a spec that means the same.

        Included files are in place, the paths in them made relative to the folder of the spec.
        """
        folder = Path(self.source.name).parent
        return file_to_json(self.syntax, moved_paths(self, folder))

    def to_peft(self) -> dict[str, dict[str, Any]]:
        """Return the `LoraConfig` settings of each adapter, by its name.

        Raises LoraFxError with everything that PEFT cannot say; what it can say only of a given
        model is `Plan.to_peft`'s to say.
        """
        from lora_fx.spec.peft.to_config import to_configs

        return to_configs(self)


SpecLike = Spec | str | Path | Mapping[str, Any]
"""A spec, its file, the text of one, or its JSON form."""
