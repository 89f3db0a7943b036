"""`model`, `layers`, `quantize`, `optimizer`, `check` and `compile`: what each says."""

from collections.abc import Sequence
from typing import Any

from lora_fx.diagnostics import Diagnostic, Span
from lora_fx.spec import syntax
from lora_fx.spec.adapters import Adapters, range_faults
from lora_fx.spec.blocks import (
    COMPILE,
    CUDA_GRAPH_MODES,
    ENTRIES,
    ENTRY,
    LAYERS,
    MODEL,
    OPTIMIZER,
    QUANTIZE,
)
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.duplicates import Duplicates
from lora_fx.spec.names import Names
from lora_fx.spec.scopes import (
    CHECK,
    COMPILE_BLOCK,
    ENTRY_BLOCK,
    LAYERS_BLOCK,
    MODEL_BLOCK,
    OPTIMIZER_BLOCK,
    QUANTIZE_BLOCK,
)
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import (
    Check,
    CompileSpec,
    EntrySpec,
    LayersSpec,
    ModelRef,
    OptimizerSpec,
    QuantizeSpec,
)


class Statements:
    """Resolve statements that name no other; faults go to the diagnostics of `names`."""

    def __init__(self, names: Names, settings: Settings) -> None:
        self._names = names
        self._settings = settings
        self._diagnostics = names.diagnostics
        self._duplicates = Duplicates(names.diagnostics)

    def model(self, model: syntax.Model | None) -> ModelRef | None:
        """Return the model that the spec is for."""
        if model is None:
            return None
        values = self._settings.constant(model.attributes, MODEL, MODEL_BLOCK)
        if not model.path.text:
            message = "`model` must be a path or an id"
            self._diagnostics.append(
                Diagnostic("wrong-value", message, model.path.span, "is empty")
            )
        return ModelRef(
            model.path.text,
            _word(values["dtype"]),
            values["revision"],
            values["trust_remote_code"],
            model.span,
        )

    def layers(self, layers: syntax.Layers | None) -> LayersSpec | None:
        """Return the new stack of layers."""
        if layers is None:
            return None
        attributes = tuple(item for item in layers.items if isinstance(item, syntax.Attribute))
        values = self._settings.constant(attributes, LAYERS, LAYERS_BLOCK)
        replicates = [item for item in layers.items if isinstance(item, syntax.Replicate)]
        drops = [item for item in layers.items if isinstance(item, syntax.Drop)]
        if not replicates and not drops:
            message = "`layers` neither repeats nor drops a layer"
            help = "write `replicate 0..4, 2..6` or `drop 3..5`, or leave it out"
            self._diagnostics.append(Diagnostic("empty-block", message, layers.span, help=help))
        replicate, drop = (
            self._duplicates.only(replicates, "replicate"),
            self._duplicates.only(drops, "drop"),
        )
        ranges = replicate.ranges if replicate else ()
        dropped = drop.ranges if drop else ()
        self._diagnostics += range_faults((*ranges, *dropped))
        share = _word(values["share"]) == "weights"
        return LayersSpec(ranges, dropped, values["of"], share, layers.span)

    def quantize(self, quantize: syntax.Quantize, adapters: Adapters) -> QuantizeSpec:
        """Return what a `quantize` statement quantises."""
        values = self._settings.constant(
            quantize.attributes, QUANTIZE, QUANTIZE_BLOCK, quantize.span
        )
        selector = adapters.selector(quantize.selector)
        return QuantizeSpec(selector, values["method"], values["storage"].name, quantize.span)

    def optimizer(self, optimizer: syntax.Optimizer | None) -> OptimizerSpec | None:
        """Return the optimizer."""
        if optimizer is None:
            return None
        values = self._settings.constant(
            optimizer.attributes, OPTIMIZER, OPTIMIZER_BLOCK, optimizer.span
        )
        name = values.pop("name").name
        self._check_optimizer(name, optimizer)
        return OptimizerSpec(name, values.pop("lr") or 0.0, **values, span=optimizer.span)

    def _check_optimizer(self, name: str, optimizer: syntax.Optimizer) -> None:
        for attribute in optimizer.attributes:
            wanted = attribute.name.text
            if wanted in (("betas", "eps") if name == "sgd" else ("momentum",)):
                message = f"`{name}` has no `{wanted}`"
                self._diagnostics.append(Diagnostic("cannot-apply", message, attribute.name.span))

    def check(self, check: syntax.Check) -> Check | None:
        """Return a condition on the plan; None if it has no meaning."""
        condition = self._names.resolve(check.condition, CHECK)
        return None if condition is None else Check(condition, check.message, check.span)

    def compile(self, statement: syntax.Compile | None) -> CompileSpec:
        """Return how the model is compiled."""
        if statement is None:
            return CompileSpec()
        written = tuple(item for item in statement.items if isinstance(item, syntax.Attribute))
        values = self._settings.constant(written, COMPILE, COMPILE_BLOCK)
        mode, unit, checkpoint = values["mode"], values["unit"].name, values["checkpoint"]
        if unit == "layers" and mode in CUDA_GRAPH_MODES:
            at = next(attribute for attribute in written if attribute.name.text == "mode")
            self._diagnostics.append(_overwriting_mode(mode, at.value.span))
        if unit == "model" and checkpoint.name == "budget":
            at = next(attribute for attribute in written if attribute.name.text == "checkpoint")
            self._diagnostics.append(_budget_of_all(at.value.span))
        return CompileSpec(
            mode,
            values["dynamic"],
            unit,
            checkpoint.name,
            checkpoint.argument("share") if checkpoint.name == "budget" else None,
            values["layout"].name,
            self._entries([item for item in statement.items if isinstance(item, syntax.Entry)]),
            statement.span,
        )

    def _entries(self, entries: Sequence[syntax.Entry]) -> tuple[EntrySpec, ...]:
        first: dict[str, syntax.Entry] = {}
        resolved = []
        for entry in entries:
            name = entry.name.text
            values = self._settings.constant(entry.attributes, ENTRY, ENTRY_BLOCK, entry.span)
            if name not in ENTRIES:
                message, help = f"there is no entry `{name}`", did_you_mean(name, ENTRIES)
                self._diagnostics.append(
                    Diagnostic("unknown-entry", message, entry.name.span, help=help)
                )
            elif first.setdefault(name, entry) is not entry:
                message = f"entry `{name}` is there already"
                self._duplicates.report("duplicate-statement", message, entry, first[name])
            resolved.append(EntrySpec(name, values["batch"], values["sequence"], entry.span))
        return tuple(resolved)


def _word(value: Any) -> str | None:
    return None if value is None else value.name


def _budget_of_all(span: Span) -> Diagnostic:
    """Refuse: what one backward pass computes again of a whole model is there all at once."""
    return Diagnostic(
        "budget-needs-layers",
        "`checkpoint = budget(…)` needs `unit = layers`",
        span,
        "of a whole model, what is computed again is there all at once",
        help="leave `unit` out, or write `checkpoint = layers`",
    )


def _overwriting_mode(mode: str, span: Span) -> Diagnostic:
    """Refuse: a CUDA graph writes its output to one place, and all layers run the same graph."""
    return Diagnostic(
        "mode-needs-whole-model",
        f'`mode = "{mode}"` needs `unit = model`',
        span,
        "with `unit = layers` each layer would overwrite the output of the one before",
        help='write `unit = model`, or `mode = "max-autotune-no-cudagraphs"`',
    )
