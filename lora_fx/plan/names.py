"""What the names in an expression stand for at one module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.config_values import config_value
from lora_fx.plan.modules import Modules
from lora_fx.spec.attributes import ADAPTER
from lora_fx.spec.evaluate import evaluate, evaluate_condition
from lora_fx.spec.expressions import Expr, Reference, Value, Word
from lora_fx.spec.problems import problems
from lora_fx.spec.rule import completed
from lora_fx.spec.spec import Setting


class Names:
    """The environment of one module: `layer.*`, `module.*`, `model.config.*`, attributes.

    An attribute is evaluated when it is asked for, from the setting that won, once.
    """

    def __init__(self, fqn: str, modules: Modules, settings: Mapping[str, Setting]) -> None:
        self.fqn = fqn
        self.settings = settings
        self._modules = modules
        self._values: dict[str, Value] = {}
        self._open: list[str] = []

    def value(self, reference: Reference) -> Value:
        """Return what a dotted name stands for here. Raises LoraFxError if nothing."""
        match reference.parts:
            case ("layer", which):
                return self._layer(reference, which)
            case ("module", "name"):
                return self.fqn
            case ("module", "class"):
                return type(self._modules.owner(self.fqn)).__name__
            case ("module", which):
                return self._features(reference, which)
            case ("model", "config", *_):
                return config_value(reference, self._modules.config)
            case _:
                return self.attribute(str(reference), reference)

    def attribute(self, name: str, reference: Reference | None = None) -> Value:
        """Return an attribute's value: the winning setting's, or the default."""
        setting = self.settings.get(name)
        if setting is None:
            default = ADAPTER[name].default
            assert default is not None
            return completed(ADAPTER[name], default)
        if name in self._open:
            around = " → ".join(f"`{n}`" for n in [*self._open[self._open.index(name) :], name])
            span = reference.span if reference else setting.span
            label = f"{around} at `{self.fqn}`"
            raise LoraFxError(
                (Diagnostic("cyclic-value", f"`{name}` depends on itself", span, label),)
            )
        if name not in self._values:
            self._open.append(name)
            value = evaluate(setting.value, self.value)
            self._open.pop()
            self._values[name] = self._checked(name, value, setting.value)
        return self._values[name]

    def number(self, name: str) -> int | float:
        """Return an attribute that is a number."""
        value = self.attribute(name)
        assert isinstance(value, int | float)
        return value

    def word(self, name: str) -> Word:
        """Return an attribute that is a bare word."""
        value = self.attribute(name)
        assert isinstance(value, Word)
        return value

    def _checked(self, name: str, value: Value, expr: Expr) -> Value:
        wrong = problems(name, ADAPTER[name], value, expr)
        if wrong:
            raise LoraFxError(
                replace(w, label=f"{w.label} at `{self.fqn}`".lstrip()) for w in wrong
            )
        return completed(ADAPTER[name], value)

    def _layer(self, reference: Reference, which: str) -> int:
        place = self._modules.place(self.fqn)
        if place is None:
            label = f"`{self.fqn}` stands in no layer"
            raise _fault("no-layer", f"`{reference}` has no value here", reference, label)
        return place.index if which == "index" else len(place.stack.layers)

    def _features(self, reference: Reference, which: str) -> int:
        layer = self._modules.layer(self.fqn)
        if layer is None:
            kind = type(self._modules.owner(self.fqn)).__name__
            label = f"`{self.fqn}` is a `{kind}`"
            raise _fault("no-features", f"`{reference}` has no value here", reference, label)
        return layer.in_features if which == "in_features" else layer.out_features


def first_failing(conditions: Sequence[Expr], modules: Modules) -> Callable[[str], Span | None]:
    """Return what finds the first condition that does not hold of a module or parameter."""

    def failing(name: str) -> Span | None:
        value = Names(name, modules, {}).value
        return next((one.span for one in conditions if not evaluate_condition(one, value)), None)

    return failing


def _fault(code: str, message: str, reference: Reference, label: str) -> LoraFxError:
    return LoraFxError((Diagnostic(code, message, reference.span, label),))
