"""`adapter` and what stands inside it."""

import re
from collections.abc import Mapping
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.spec import syntax
from lora_fx.spec.attributes import OF_THE_WHOLE_ADAPTER
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Array, Expr, Value, references, show
from lora_fx.spec.names import Names
from lora_fx.spec.other_words import is_selector
from lora_fx.spec.patterns import bad_pattern
from lora_fx.spec.scopes import TOKENS, WHERE
from lora_fx.spec.selectors import Atom, Range, Selector
from lora_fx.spec.settings import Settings
from lora_fx.spec.spec import AdapterSpec, Setting, Target, Tokens, Train

RESERVED = ("base", "__base__")


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


def name_faults(name: syntax.Name) -> list[Diagnostic]:
    """Return what is wrong with the name of an adapter, or of a merge."""
    if name.text in RESERVED:
        message = f"`{name.text}` is the model without adapters"
        help = "give the adapter another name"
        return [Diagnostic("reserved-name", message, name.span, help=help)]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name.text):
        message = "the name of an adapter consists of letters, digits, `_` and `-`"
        return [Diagnostic("bad-name", message, name.span)]
    return []


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
        self._diagnostics += name_faults(adapter.name)
        settings = self._defaults(adapter)
        items = [item for item in adapter.items if not isinstance(item, syntax.Use)]
        says_where = any(
            not isinstance(item, syntax.Attribute) or is_selector(item.name.text) for item in items
        )
        if not says_where and "weights" not in settings:
            message = f"adapter `{adapter.name.text}` adapts nothing"
            help = "write `target linear`, or name modules"
            self._diagnostics.append(Diagnostic("no-target", message, adapter.span, help=help))
        return AdapterSpec(
            adapter.name.text,
            adapter.span,
            settings,
            tuple(self._target(item) for item in items if isinstance(item, syntax.Target)),
            tuple(self._train(item) for item in items if isinstance(item, syntax.Train)),
            tuple(self._tokens(item) for item in items if isinstance(item, syntax.Tokens)),
        )

    def selector(self, selector: Selector) -> Selector:
        """Return a selector with the names in its conditions looked up."""
        for atom in selector.atoms + selector.excludes:
            self._check_atom(atom)
        self._diagnostics += range_faults(selector.layers or ())
        conditions = (self._names.resolve(expr, WHERE) for expr in selector.conditions)
        return replace(selector, conditions=tuple(c for c in conditions if c is not None))

    def _defaults(self, adapter: syntax.Adapter) -> dict[str, Setting]:
        written = tuple(item for item in adapter.items if isinstance(item, syntax.Attribute))
        own = self._settings.of_adapter(written, f"adapter {adapter.name.text}")
        merged: dict[str, Setting] = {}
        for item in adapter.items:
            new: Mapping[str, Setting] = {}
            if isinstance(item, syntax.Use):
                new = self._preset(item.preset)
            elif isinstance(item, syntax.Attribute) and item.name.text in own:
                new = {item.name.text: own[item.name.text]}
            for name, setting in new.items():
                merged[name] = replace(setting, over=merged.get(name))
        for name in OF_THE_WHOLE_ADAPTER:
            if name in merged and any(references(merged[name].value)):
                self._one_value(name, merged.pop(name).span)
        return merged

    def _preset(self, name: syntax.Name) -> Mapping[str, Setting]:
        if name.text not in self._presets:
            message = f"there is no preset `{name.text}`"
            help = did_you_mean(name.text, self._presets)
            self._diagnostics.append(Diagnostic("unknown-preset", message, name.span, help=help))
        return self._presets.get(name.text, {})

    def _target(self, target: syntax.Target) -> Target:
        origin = f"target {target.selector.text}"
        settings = self._settings.of_adapter(target.attributes, origin)
        for name in OF_THE_WHOLE_ADAPTER:
            if name in settings:
                self._one_value(name, settings.pop(name).span)
        return Target(self.selector(target.selector), settings, target.optional, target.span)

    def _one_value(self, name: str, span: Span) -> None:
        message = f"`{name}` has one value for the whole adapter"
        help = "write a constant in the block of the adapter"
        self._diagnostics.append(Diagnostic("misplaced-attribute", message, span, help=help))

    def _train(self, train: syntax.Train) -> Train:
        return Train(self.selector(train.selector), train.optional, train.span)

    def _tokens(self, tokens: syntax.Tokens) -> Tokens:
        if tokens.atom is not None:
            self._check_atom(tokens.atom)
        ids: tuple[Value, ...] = ()
        expr = self._names.resolve(tokens.ids, TOKENS)
        try:
            value = () if expr is None else evaluate(expr, no_environment)
            ids = value if isinstance(value, tuple) else ()
        except LoraFxError as error:
            self._diagnostics += error.diagnostics
        if expr is not None:
            self._check_ids(ids, expr)
        return Tokens(tuple(id for id in ids if type(id) is int), tokens.atom, tokens.span)

    def _check_ids(self, ids: tuple[Value, ...], expr: Expr) -> None:
        items = expr.items if isinstance(expr, Array) else ()
        for id, item in zip(ids, items, strict=False):
            if type(id) is not int or id < 0:
                message = "a token id must be a whole number of at least 0"
                label = f"is {show(id)}"
                self._diagnostics.append(Diagnostic("wrong-value", message, item.span, label))
        if len(set(ids)) < len(ids) or not ids:
            message = "a list of tokens names each once, and at least one"
            self._diagnostics.append(Diagnostic("wrong-value", message, expr.span))

    def _check_atom(self, atom: Atom) -> None:
        reason = bad_pattern(atom)
        if reason is not None:
            message = f"`{atom}` is not a pattern"
            self._diagnostics.append(Diagnostic("bad-pattern", message, atom.span, reason))
