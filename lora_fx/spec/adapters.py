"""`adapter` and what stands inside it."""

import re
from collections.abc import Mapping
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec import syntax
from lora_fx.spec.attributes import LATER_ADAPTER
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.names import WHERE, Names
from lora_fx.spec.selectors import Atom, BadGlob, Range, Selector, glob_to_regex
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import AdapterSpec, Setting, Target

_RESERVED = ("base", "__base__")


def not_supported(statement: syntax.Unsupported) -> Diagnostic:
    """Return the refusal of what a later version brings."""
    message = f"`{statement.what}` is not supported yet"
    return Diagnostic("not-supported-yet", message, statement.span)


def range_faults(ranges: tuple[Range, ...]) -> list[Diagnostic]:
    """Return what is wrong with ranges of layers, whatever the model."""
    return [
        Diagnostic(
            "empty-range",
            f"the range `{part}` holds no layer",
            part.span,
            help="a range ends before its second number, as in Python",
        )
        for part in ranges
        if part.end is not None and (part.start or 0) >= part.end
    ]


class Adapters:
    """Resolve adapters, given the presets; faults go to the diagnostics of `names`."""

    def __init__(
        self, names: Names, settings: Settings, presets: Mapping[str, Mapping[str, Setting]]
    ) -> None:
        self._names = names
        self._settings = settings
        self._presets = presets
        self._diagnostics = names.diagnostics

    def resolve(self, adapter: syntax.Adapter) -> AdapterSpec:
        """Return the adapter with its presets expanded where they are used."""
        self._check_name(adapter.name)
        targets = []
        for item in adapter.items:
            if isinstance(item, syntax.Unsupported):
                self._diagnostics.append(not_supported(item))
            elif isinstance(item, syntax.Target):
                targets.append(self._target(item))
        if not any(_says_where(item) for item in adapter.items):
            message = f"adapter `{adapter.name.text}` adapts nothing"
            help = "write `target linear`, or name modules"
            self._diagnostics.append(Diagnostic("no-target", message, adapter.span, help=help))
        return AdapterSpec(
            adapter.name.text,
            adapter.span,
            self._defaults(adapter),
            tuple(target for target in targets if target is not None),
        )

    def _check_name(self, name: syntax.Name) -> None:
        if name.text in _RESERVED:
            message = f"`{name.text}` is the model without adapters"
            help = "give the adapter another name"
            self._diagnostics.append(Diagnostic("reserved-name", message, name.span, help=help))
        elif not re.fullmatch(r"[A-Za-z0-9_-]+", name.text):
            message = "the name of an adapter consists of letters, digits, `_` and `-`"
            self._diagnostics.append(Diagnostic("bad-name", message, name.span))

    def _defaults(self, adapter: syntax.Adapter) -> dict[str, Setting]:
        written = tuple(item for item in adapter.items if isinstance(item, syntax.Attribute))
        own = self._settings.of_adapter(written, f"adapter {adapter.name.text}")
        merged: dict[str, Setting] = {}
        for item in adapter.items:
            if isinstance(item, syntax.Use):
                merged |= self._preset(item.preset)
            elif isinstance(item, syntax.Attribute) and item.name.text in own:
                merged[item.name.text] = own[item.name.text]
        return merged

    def _preset(self, name: syntax.Name) -> Mapping[str, Setting]:
        if name.text not in self._presets:
            message = f"there is no preset `{name.text}`"
            help = did_you_mean(name.text, self._presets)
            self._diagnostics.append(Diagnostic("unknown-preset", message, name.span, help=help))
        return self._presets.get(name.text, {})

    def _target(self, target: syntax.Target) -> Target | None:
        selector = target.selector
        if isinstance(selector, syntax.Unsupported):
            self._diagnostics.append(not_supported(selector))
            self._settings.of_adapter(target.attributes, "")
            return None
        settings = self._settings.of_adapter(target.attributes, f"target {selector.text}")
        return Target(self._selector(selector), settings, target.optional, target.span)

    def _selector(self, selector: Selector) -> Selector:
        for atom in selector.atoms + selector.excludes:
            self._check_atom(atom)
        self._diagnostics += range_faults(selector.layers or ())
        conditions = (self._names.resolve(expr, WHERE) for expr in selector.conditions)
        return replace(selector, conditions=tuple(c for c in conditions if c is not None))

    def _check_atom(self, atom: Atom) -> None:
        if atom.kind != "glob":
            return
        try:
            glob_to_regex(atom.pattern)
        except BadGlob as error:
            message = f"`{atom}` is not a pattern"
            self._diagnostics.append(Diagnostic("bad-pattern", message, atom.span, str(error)))


def _says_where(item: object) -> bool:
    if isinstance(item, syntax.Attribute):
        return item.name.text in LATER_ADAPTER
    return isinstance(item, syntax.Target | syntax.Unsupported)
