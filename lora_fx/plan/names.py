"""What the names in an expression stand for at one module."""

from collections.abc import Mapping
from dataclasses import replace

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.config_values import config_value
from lora_fx.plan.modules import Modules
from lora_fx.spec.attributes import ADAPTER, problem
from lora_fx.spec.evaluate import evaluate
from lora_fx.spec.expressions import Reference, Value
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
                return type(self._modules.by_fqn[self.fqn]).__name__
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
            return default
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
            self._values[name] = self._checked(name, value, setting)
        return self._values[name]

    def _checked(self, name: str, value: Value, setting: Setting) -> Value:
        wrong = problem(name, ADAPTER[name], value, setting.value.span)
        if wrong is not None:
            raise LoraFxError((replace(wrong, label=f"{wrong.label} at `{self.fqn}`"),))
        return value

    def _layer(self, reference: Reference, which: str) -> int:
        place = self._modules.place(self.fqn)
        if place is None:
            label = f"`{self.fqn}` stands in no layer"
            raise _fault("no-layer", f"`{reference}` has no value here", reference, label)
        return place.index if which == "index" else len(place.stack.layers)

    def _features(self, reference: Reference, which: str) -> int:
        module = self._modules.by_fqn[self.fqn]
        value = getattr(module, which, None)
        if not isinstance(value, int):
            label = f"`{self.fqn}` is a `{type(module).__name__}`"
            raise _fault("no-features", f"`{reference}` has no value here", reference, label)
        return value


def _fault(code: str, message: str, reference: Reference, label: str) -> LoraFxError:
    return LoraFxError((Diagnostic(code, message, reference.span, label),))
