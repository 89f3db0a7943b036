"""Attributes in blocks: known, written once, and of a right value as far as it is constant."""

from collections.abc import Iterator, Mapping

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.attributes import ADAPTER, LATER_ADAPTER, Rule, problem
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Expr, Value, references, results
from lora_fx.spec.names import ATTRIBUTE, Names, Scope
from lora_fx.spec.spec import Setting
from lora_fx.spec.syntax import Attribute


class Settings:
    """Turn attributes as written into settings; faults go to the diagnostics of `names`."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._diagnostics = names.diagnostics

    def of_adapter(self, written: tuple[Attribute, ...], origin: str) -> dict[str, Setting]:
        """Return the settings of an adapter, preset or target; values may depend on the module."""
        settings = {}
        for attribute, rule in self._known(written, ADAPTER, LATER_ADAPTER):
            name = attribute.name.text
            expr = self._names.resolve(attribute.value, ATTRIBUTE)
            if expr is None or self._depends_on_itself(name, expr):
                continue
            self._check_results(name, rule, expr)
            settings[name] = Setting(expr, attribute.span, origin)
        return settings

    def constant(
        self,
        written: tuple[Attribute, ...],
        table: Mapping[str, Rule],
        later: tuple[str, ...],
        scope: Scope,
    ) -> dict[str, Value]:
        """Return the values of a block that knows no module."""
        values = {}
        for attribute, rule in self._known(written, table, later):
            expr = self._names.resolve(attribute.value, scope)
            if expr is not None:
                value = self._checked(attribute.name.text, rule, expr)
                if value is not None:
                    values[attribute.name.text] = value
        return values

    def _known(
        self, written: tuple[Attribute, ...], table: Mapping[str, Rule], later: tuple[str, ...]
    ) -> Iterator[tuple[Attribute, Rule]]:
        first: dict[str, Attribute] = {}
        for attribute in written:
            name, span = attribute.name.text, attribute.name.span
            if name in later:
                message = f"`{name}` is not supported yet"
                self._diagnostics.append(Diagnostic("not-supported-yet", message, span))
            elif name not in table:
                message, help = f"there is no attribute `{name}`", did_you_mean(name, table)
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
        wrong = problem(name, rule, value, expr.span)
        if wrong is None:
            return value
        self._diagnostics.append(wrong)
        return None
