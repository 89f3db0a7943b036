"""Syntax tree to Spec: what the statements mean, and everything that is wrong with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
from lora_fx.spec import syntax
from lora_fx.spec.adapters import Adapters, not_supported, range_faults
from lora_fx.spec.attributes import COMPILE, CUDA_GRAPH_MODES, LATER_COMPILE, MODEL
from lora_fx.spec.constants import evaluate_constants
from lora_fx.spec.load import load
from lora_fx.spec.names import CHECK, COMPILE_BLOCK, MODEL_BLOCK
from lora_fx.spec.parser import parse_source
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import Check, CompileSpec, ModelRef, Replication, Spec

_VERSION = 1
_MAY_FOLLOW = ("unknown-name", "unknown-preset", "no-target", "empty-block")
_LATER_LAYERS = ("of", "share")
_Part = TypeVar("_Part")
_Named = TypeVar("_Named", syntax.Let, syntax.Preset, syntax.Adapter)


def parse(path_or_text: str | Path) -> Spec:
    """Read a `.lora` file, or its text: a str that begins with `lora ` or has a line break.

    Raises LoraFxError with everything that is wrong, in the order of the file.
    """
    source, path = load(path_or_text)
    file, faults = parse_source(source)
    spec = None
    if file is not None:
        resolver = _Resolver(file)
        spec = resolver.spec(source, path)
        # After a statement that could not be read, what refers to it is not to blame.
        faults += [d for d in resolver.diagnostics if not faults or d.code not in _MAY_FOLLOW]
    if spec is None or faults:
        raise LoraFxError(sorted(faults, key=lambda d: d.span.start if d.span else -1))
    return spec


class _Resolver:
    def __init__(self, file: syntax.File) -> None:
        self.diagnostics: list[Diagnostic] = []
        self._file = file
        lets = self._by_name(syntax.Let, "constant")
        self._names = evaluate_constants(lets, self.diagnostics)
        self._settings = Settings(self._names)

    def spec(self, source: Source, path: Path | None) -> Spec:
        header = self._file.header
        if header.version != _VERSION:
            message = f"version {header.version} of the language is not known"
            help = f"write `lora {_VERSION}`"
            self._report(Diagnostic("unsupported-version", message, header.span, help=help))
        for statement in self._all(syntax.Unsupported):
            self._report(not_supported(statement))
        presets = {
            name: self._settings.of_adapter(preset.attributes, f"preset {name}")
            for name, preset in self._by_name(syntax.Preset, "preset").items()
        }
        adapters = Adapters(self._names, self._settings, presets)
        named = self._by_name(syntax.Adapter, "adapter").values()
        checks = (self._check(check) for check in self._all(syntax.Check))
        return Spec(
            source,
            path,
            self._model(self._only(self._all(syntax.Model), "model")),
            self._replication(self._only(self._all(syntax.Layers), "layers")),
            tuple(adapters.resolve(adapter) for adapter in named),
            tuple(check for check in checks if check is not None),
            self._compile(self._only(self._all(syntax.Compile), "compile")),
        )

    def _model(self, model: syntax.Model | None) -> ModelRef | None:
        if model is None:
            return None
        values: dict[str, Any] = self._settings.constant(model.attributes, MODEL, (), MODEL_BLOCK)
        if not model.path.text:
            message = "`model` must be a path or an id"
            self._report(Diagnostic("wrong-value", message, model.path.span, "is empty"))
        return ModelRef(
            model.path.text,
            values["dtype"].name if "dtype" in values else None,
            values.get("revision"),
            values.get("trust_remote_code", False),
            model.span,
        )

    def _replication(self, layers: syntax.Layers | None) -> Replication | None:
        if layers is None:
            return None
        attributes = tuple(item for item in layers.items if isinstance(item, syntax.Attribute))
        self._settings.constant(attributes, {}, _LATER_LAYERS, MODEL_BLOCK)
        self._refuse(layers.items)
        if not layers.items:
            help = "write `replicate`, or leave it out"
            self._report(Diagnostic("empty-block", "`layers` says nothing", layers.span, help=help))
        replicates = [item for item in layers.items if isinstance(item, syntax.Replicate)]
        replicate = self._only(replicates, "replicate")
        if replicate is None:
            return None
        self.diagnostics += range_faults(replicate.ranges)
        return Replication(replicate.ranges, replicate.span)

    def _check(self, check: syntax.Check) -> Check | None:
        condition = self._names.resolve(check.condition, CHECK)
        return None if condition is None else Check(condition, check.message, check.span)

    def _compile(self, statement: syntax.Compile | None) -> CompileSpec:
        if statement is None:
            return CompileSpec()
        self._refuse(statement.items)
        written = tuple(item for item in statement.items if isinstance(item, syntax.Attribute))
        values: dict[str, Any] = self._settings.constant(
            written, COMPILE, LATER_COMPILE, COMPILE_BLOCK
        )
        mode = values.get("mode", "default")
        unit = values["unit"].name if "unit" in values else "layers"
        if unit == "layers" and mode in CUDA_GRAPH_MODES:
            at = next(attribute for attribute in written if attribute.name.text == "mode")
            self._report(_overwriting_mode(mode, at.value.span))
        return CompileSpec(
            mode,
            values.get("dynamic"),
            unit,
            values["checkpoint"].name if "checkpoint" in values else "none",
            statement.span,
        )

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

    def _duplicate(self, code: str, message: str, again: Any, first: Any) -> None:
        there = ((first.span, "the first one"),)
        self._report(Diagnostic(code, message, again.span, secondary=there))

    def _refuse(self, items: Sequence[object]) -> None:
        for item in items:
            if isinstance(item, syntax.Unsupported):
                self._report(not_supported(item))

    def _report(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)


def _overwriting_mode(mode: str, span: Span) -> Diagnostic:
    """Refuse: a CUDA graph writes its output to one place, and all layers run the same graph."""
    return Diagnostic(
        "mode-needs-whole-model",
        f'`mode = "{mode}"` needs `unit = model`',
        span,
        "with `unit = layers` each layer would overwrite the output of the one before",
        help='write `unit = model`, or `mode = "max-autotune-no-cudagraphs"`',
    )
