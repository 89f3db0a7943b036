"""Syntax tree to Spec: what the statements mean, and everything that is wrong with them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source
from lora_fx.spec import syntax
from lora_fx.spec.adapters import Adapters
from lora_fx.spec.constants import evaluate_constants
from lora_fx.spec.duplicates import Duplicates
from lora_fx.spec.include import read_whole
from lora_fx.spec.load import load
from lora_fx.spec.mixes import Mixes
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import Spec
from lora_fx.spec.statements import Statements

_MAY_FOLLOW = ("unknown-name", "unknown-preset", "unknown-adapter", "no-target", "empty-block")
_Part = TypeVar("_Part")
_Named = TypeVar("_Named", syntax.Let, syntax.Preset, syntax.Adapter, syntax.Merge)


def parse(spec: str | Path | Mapping[str, Any] | Source) -> Spec:
    """Read a `.lora` file, or its text: a str that begins with `lora ` or has a line break.

    A mapping, or a `.json` file, is read as the JSON form of one (`Spec.to_json`); a `Source` is a
    text with the name that diagnostics call it by. Raises
    LoraFxError with everything that is wrong, in the order of the file.
    """
    source, path = load(spec)
    file, faults = read_whole(source, path)
    found = None
    if file is not None:
        more: list[Diagnostic] = []
        found = _resolve(file, source, path, more)
        # After a statement that could not be read, what refers to it is not to blame.
        faults += [d for d in more if file.whole or d.code not in _MAY_FOLLOW]
    if found is None or faults:
        raise LoraFxError(_in_order(faults, source))
    return found


def _in_order(faults: Sequence[Diagnostic], root: Source) -> list[Diagnostic]:
    """Sort by place, the first file first, the others in the order they are met."""
    sources = dict.fromkeys([root, *(d.span.source for d in faults if d.span)])
    number = {id(source): i for i, source in enumerate(sources)}
    places = {id(d): (number[id(d.span.source)], d.span.start) for d in faults if d.span}
    return sorted(faults, key=lambda d: places.get(id(d), (-1, 0)))


def _resolve(
    file: syntax.File, source: Source, path: Path | None, diagnostics: list[Diagnostic]
) -> Spec:
    duplicates = Duplicates(diagnostics)

    def every(kind: type[_Part]) -> list[_Part]:
        return [part for part in file.statements if isinstance(part, kind)]

    def only(kind: type[_Part]) -> _Part | None:
        return duplicates.only(every(kind), kind.__name__.lower())

    names = evaluate_constants(duplicates.by_name(every(syntax.Let), "constant"), diagnostics)
    settings = Settings(names)
    presets = {
        name: settings.of_adapter(preset.attributes, f"preset {name}")
        for name, preset in duplicates.by_name(every(syntax.Preset), "preset").items()
    }
    adapters = Adapters(names, settings, presets)
    named = duplicates.by_name(every(syntax.Adapter), "adapter")
    merges = duplicates.by_name(every(syntax.Merge), "merge")
    duplicates.distinct(named, merges)
    mixes = Mixes(names, settings, named, merges)
    statements = Statements(names, settings)
    route = only(syntax.Route)
    checks = (statements.check(check) for check in every(syntax.Check))
    return Spec(
        source,
        path,
        file,
        statements.model(only(syntax.Model)),
        statements.layers(only(syntax.Layers)),
        tuple(statements.quantize(part, adapters) for part in every(syntax.Quantize)),
        tuple(adapters.resolve(adapter) for adapter in named.values()),
        mixes.route(route) if route else None,
        mixes.merges(),
        statements.optimizer(only(syntax.Optimizer)),
        tuple(check for check in checks if check is not None),
        statements.compile(only(syntax.Compile)),
    )
