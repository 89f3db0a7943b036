"""Attributes in blocks: known, written once, and of a right value as far as it is constant."""

from collections.abc import Iterator
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.blocks import BLOCKS
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Expr, Value, references, results
from lora_fx.spec.names import Names
from lora_fx.spec.other_words import other_setting
from lora_fx.spec.problems import problems
from lora_fx.spec.recovery import INNER_STATEMENTS
from lora_fx.spec.rule import Rule, Rules, completed, listed
from lora_fx.spec.scopes import ATTRIBUTE, Scope
from lora_fx.spec.spec import Setting
from lora_fx.spec.syntax import Attribute, Attributes


class Settings:
    """Turn attributes as written into settings; faults go to the diagnostics of `names`."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._diagnostics = names.diagnostics

    def of_adapter(self, written: Attributes, origin: str) -> dict[str, Setting]:
        """Return the settings of an adapter, preset or target; values may depend on the module."""
        settings = {}
        for attribute, rule in self._known(written, ADAPTER):
            name = attribute.name.text
            expr = self._names.resolve(attribute.value, ATTRIBUTE, (name, rule))
            if expr is None or self._depends_on_itself(name, expr):
                continue
            self._check_results(name, rule, expr)
            settings[name] = Setting(expr, attribute.span, origin)
        return settings

    def constant(
        self, written: Attributes, table: Rules, scope: Scope, block: Span | None = None
    ) -> dict[str, Any]:
        """Return the values of a block that knows no module, defaults included.

        `block` is where to say that a required attribute is missing.
        """
        values: dict[str, Any] = {name: rule.default for name, rule in table.items()}
        for attribute, rule in self._known(written, table):
            name = attribute.name.text
            expr = self._names.resolve(attribute.value, scope, (name, rule))
            value = None if expr is None else self._checked(name, rule, expr)
            if value is not None:
                values[name] = completed(rule, value)
        names = {attribute.name.text for attribute in written}
        for name, rule in table.items():
            if rule.required and name not in names and names <= table.keys():
                message = f"{scope.place} needs `{name}`"
                help = f"write `{name} = …`; it must be {rule.expects}"
                self._diagnostics.append(Diagnostic("missing-attribute", message, block, help=help))
        return values

    def _known(self, written: Attributes, table: Rules) -> Iterator[tuple[Attribute, Rule]]:
        first: dict[str, Attribute] = {}
        for attribute in written:
            name, span = attribute.name.text, attribute.name.span
            if name not in table:
                message = f"there is no attribute `{name}`"
                help = other_setting(name) or _home(name) or did_you_mean(name, table)
                self._diagnostics.append(Diagnostic("unknown-attribute", message, span, help=help))
            elif first.setdefault(name, attribute) is not attribute:
                there = ((first[name].name.span, "the first one"),)
                message = f"`{name}` is set twice in one block"
                self._diagnostics.append(
                    Diagnostic("duplicate-attribute", message, span, secondary=there)
                )
            else:
                yield attribute, table[name]

    def _depends_on_itself(self, name: str, expr: Expr) -> bool:
        for reference in references(expr):
            if str(reference) == name:
                message = f"`{name}` depends on itself"
                self._diagnostics.append(Diagnostic("cyclic-value", message, reference.span))
                return True
        return False

    def _check_results(self, name: str, rule: Rule, expr: Expr) -> None:
        constant = not any(references(expr))
        for result in (expr,) if constant else results(expr):
            if not any(references(result)):
                self._checked(name, rule, result)

    def _checked(self, name: str, rule: Rule, expr: Expr) -> Value | None:
        try:
            value = evaluate(expr, no_environment)
        except LoraFxError as error:
            self._diagnostics.extend(error.diagnostics)
            return None
        wrong = problems(name, rule, value, expr)
        self._diagnostics += wrong
        return None if wrong else value


def _home(name: str) -> str | None:
    """Return where something of this name does stand, as help."""
    if name in INNER_STATEMENTS:
        return f"`{name}` is a statement of `{INNER_STATEMENTS[name]}`: write it without `=`"
    homes = [f"`{block}`" for block, table in BLOCKS.items() if name in table]
    return f"`{name}` stands inside {listed(homes)}" if homes else None
