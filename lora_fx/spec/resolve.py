"""Syntax tree to Spec: what the statements mean, and everything that is wrong with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
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
from lora_fx.spec.constants import evaluate_constants
from lora_fx.spec.include import read_whole
from lora_fx.spec.load import load
from lora_fx.spec.mixes import Mixes
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
    Spec,
)

_MAY_FOLLOW = ("unknown-name", "unknown-preset", "unknown-adapter", "no-target", "empty-block")
_Part = TypeVar("_Part")
_Named = TypeVar("_Named", syntax.Let, syntax.Preset, syntax.Adapter, syntax.Merge)


def parse(spec: str | Path | Mapping[str, Any]) -> Spec:
    """Read a `.lora` file, or its text: a str that begins with `lora ` or has a line break.

    A mapping, or a `.json` file, is read as the JSON form of one (`Spec.to_json`). Raises
    LoraFxError with everything that is wrong, in the order of the file.
    """
    source, path = load(spec)
    file, faults = read_whole(source, path)
    found = None
    if file is not None:
        resolver = _Resolver(file)
        found = resolver.spec(source, path)
        # After a statement that could not be read, what refers to it is not to blame.
        faults += [d for d in resolver.diagnostics if not faults or d.code not in _MAY_FOLLOW]
    if found is None or faults:
        raise LoraFxError(_in_order(faults, source))
    return found


def _in_order(faults: Sequence[Diagnostic], root: Source) -> list[Diagnostic]:
    """Sort by place, the first file first, the others in the order they are met."""
    sources = dict.fromkeys([root, *(d.span.source for d in faults if d.span)])
    number = {id(source): i for i, source in enumerate(sources)}
    places = {id(d): (number[id(d.span.source)], d.span.start) for d in faults if d.span}
    return sorted(faults, key=lambda d: places.get(id(d), (-1, 0)))


class _Resolver:
    def __init__(self, file: syntax.File) -> None:
        self.diagnostics: list[Diagnostic] = []
        self._file = file
        lets = self._by_name(syntax.Let, "constant")
        self._names: Names = evaluate_constants(lets, self.diagnostics)
        self._settings = Settings(self._names)

    def spec(self, source: Source, path: Path | None) -> Spec:
        presets = {
            name: self._settings.of_adapter(preset.attributes, f"preset {name}")
            for name, preset in self._by_name(syntax.Preset, "preset").items()
        }
        adapters = Adapters(self._names, self._settings, presets)
        named = self._by_name(syntax.Adapter, "adapter")
        merges = self._by_name(syntax.Merge, "merge")
        self._distinct(named, merges)
        mixes = Mixes(self._names, self._settings, named, merges)
        route = self._only(self._all(syntax.Route), "route")
        checks = (self._check(check) for check in self._all(syntax.Check))
        return Spec(
            source,
            path,
            self._file,
            self._model(self._only(self._all(syntax.Model), "model")),
            self._layers(self._only(self._all(syntax.Layers), "layers")),
            tuple(self._quantize(part, adapters) for part in self._all(syntax.Quantize)),
            tuple(adapters.resolve(adapter) for adapter in named.values()),
            mixes.route(route) if route else None,
            mixes.merges(),
            self._optimizer(self._only(self._all(syntax.Optimizer), "optimizer")),
            tuple(check for check in checks if check is not None),
            self._compile(self._only(self._all(syntax.Compile), "compile")),
        )

    def _model(self, model: syntax.Model | None) -> ModelRef | None:
        if model is None:
            return None
        values = self._settings.constant(model.attributes, MODEL, MODEL_BLOCK)
        if not model.path.text:
            message = "`model` must be a path or an id"
            self._report(Diagnostic("wrong-value", message, model.path.span, "is empty"))
        return ModelRef(
            model.path.text,
            _word(values["dtype"]),
            values["revision"],
            values["trust_remote_code"],
            model.span,
        )

    def _layers(self, layers: syntax.Layers | None) -> LayersSpec | None:
        if layers is None:
            return None
        attributes = tuple(item for item in layers.items if isinstance(item, syntax.Attribute))
        values = self._settings.constant(attributes, LAYERS, LAYERS_BLOCK)
        replicates = [item for item in layers.items if isinstance(item, syntax.Replicate)]
        drops = [item for item in layers.items if isinstance(item, syntax.Drop)]
        if not replicates and not drops:
            message = "`layers` neither repeats nor drops a layer"
            help = "write `replicate 0..4, 2..6` or `drop 3..5`, or leave it out"
            self._report(Diagnostic("empty-block", message, layers.span, help=help))
        replicate, drop = self._only(replicates, "replicate"), self._only(drops, "drop")
        ranges = replicate.ranges if replicate else ()
        dropped = drop.ranges if drop else ()
        self.diagnostics += range_faults((*ranges, *dropped))
        share = _word(values["share"]) == "weights"
        return LayersSpec(ranges, dropped, values["of"], share, layers.span)

    def _quantize(self, quantize: syntax.Quantize, adapters: Adapters) -> QuantizeSpec:
        values = self._settings.constant(
            quantize.attributes, QUANTIZE, QUANTIZE_BLOCK, quantize.span
        )
        selector = adapters.selector(quantize.selector)
        return QuantizeSpec(selector, values["method"], values["storage"].name, quantize.span)

    def _optimizer(self, optimizer: syntax.Optimizer | None) -> OptimizerSpec | None:
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
                self._report(Diagnostic("cannot-apply", message, attribute.name.span))

    def _check(self, check: syntax.Check) -> Check | None:
        condition = self._names.resolve(check.condition, CHECK)
        return None if condition is None else Check(condition, check.message, check.span)

    def _compile(self, statement: syntax.Compile | None) -> CompileSpec:
        if statement is None:
            return CompileSpec()
        written = tuple(item for item in statement.items if isinstance(item, syntax.Attribute))
        values = self._settings.constant(written, COMPILE, COMPILE_BLOCK)
        mode, unit, checkpoint = values["mode"], values["unit"].name, values["checkpoint"]
        if unit == "layers" and mode in CUDA_GRAPH_MODES:
            at = next(attribute for attribute in written if attribute.name.text == "mode")
            self._report(_overwriting_mode(mode, at.value.span))
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
                self._report(Diagnostic("unknown-entry", message, entry.name.span, help=help))
            elif first.setdefault(name, entry) is not entry:
                message = f"entry `{name}` is there already"
                self._duplicate("duplicate-statement", message, entry, first[name])
            resolved.append(EntrySpec(name, values["batch"], values["sequence"], entry.span))
        return tuple(resolved)

    def _all(self, kind: type[_Part]) -> list[_Part]:
        return [part for part in self._file.statements if isinstance(part, kind)]

    def _only(self, statements: Sequence[_Part], what: str) -> _Part | None:
        for again in statements[1:]:
            message = f"`{what}` stands in a file once"
            self._duplicate("duplicate-statement", message, again, statements[0])
        return statements[0] if statements else None

    def _by_name(self, kind: type[_Named], what: str) -> dict[str, _Named]:
        first: dict[str, _Named] = {}
        for part in self._all(kind):
            name = part.name.text
            if first.setdefault(name, part) is not part:
                message = f"{what} `{name}` is there already"
                self._duplicate("duplicate-name", message, part.name, first[name].name)
        return first

    def _distinct(
        self, adapters: dict[str, syntax.Adapter], merges: dict[str, syntax.Merge]
    ) -> None:
        for name in adapters.keys() & merges.keys():
            message = f"`{name}` is an adapter and a merge"
            self._duplicate("duplicate-name", message, merges[name].name, adapters[name].name)

    def _duplicate(self, code: str, message: str, again: Any, first: Any) -> None:
        there = ((first.span, "the first one"),)
        self._report(Diagnostic(code, message, again.span, secondary=there))

    def _report(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)


def _word(value: Any) -> str | None:
    return None if value is None else value.name


def _overwriting_mode(mode: str, span: Span) -> Diagnostic:
    """Refuse: a CUDA graph writes its output to one place, and all layers run the same graph."""
    return Diagnostic(
        "mode-needs-whole-model",
        f'`mode = "{mode}"` needs `unit = model`',
        span,
        "with `unit = layers` each layer would overwrite the output of the one before",
        help='write `unit = model`, or `mode = "max-autotune-no-cudagraphs"`',
    )
