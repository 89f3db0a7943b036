"""What the names in an expression stand for at one module."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.stacks import Place
from lora_fx.spec.attributes import ADAPTER, problem
from lora_fx.spec.evaluate import evaluate
from lora_fx.spec.expressions import Reference, Value
from lora_fx.spec.spec import Setting


class Names:
    """The environment of one module: `layer.*`, `module.*`, `model.config.*`, attributes.

    An attribute is evaluated when it is asked for, from the setting that won, once.
    """

    def __init__(
        self,
        fqn: str,
        module: nn.Module,
        place: Place | None,
        config: Any,
        settings: Mapping[str, Setting],
    ) -> None:
        self.fqn = fqn
        self.settings = settings
        self._module = module
        self._place = place
        self._config = config
        self._values: dict[str, Value] = {}
        self._open: list[str] = []

    def value(self, reference: Reference) -> Value:
        """Return what a dotted name stands for here. Raises LoraFxError if nothing."""
        match reference.parts:
            case ("layer", "index" | "count" as which):
                return self._layer(reference, which)
            case ("module", "name"):
                return self.fqn
            case ("module", "class"):
                return type(self._module).__name__
            case ("module", "in_features" | "out_features" as which):
                return self._features(reference, which)
            case ("model", "config", *path):
                return self._from_config(reference, path)
            case (name,) if name in ADAPTER:
                return self.attribute(name, reference)
            case _:
                raise _fault("unknown-name", f"`{reference}` has no value here", reference)

    def attribute(self, name: str, reference: Reference | None = None) -> Value:
        """Return an attribute's value: the winning setting's, or the default."""
        if name in self._values:
            return self._values[name]
        setting = self.settings.get(name)
        if setting is None:
            default = ADAPTER[name].default
            assert default is not None
            return default
        if name in self._open:
            around = " → ".join(f"`{n}`" for n in [*self._open[self._open.index(name) :], name])
            span = reference.span if reference else setting.span
            raise LoraFxError(
                (Diagnostic("cycle", f"`{name}` is defined by itself", span, f"by {around}"),)
            )
        self._open.append(name)
        value = evaluate(setting.value, self.value)
        self._open.pop()
        wrong = problem(name, ADAPTER[name], value, setting.value.span)
        if wrong is not None:
            notes = (*wrong.notes, f"at `{self.fqn}`")
            raise LoraFxError(
                (Diagnostic(wrong.code, wrong.message, wrong.span, wrong.label, (), notes),)
            )
        self._values[name] = value
        return value

    def _layer(self, reference: Reference, which: str) -> int:
        if self._place is None:
            message = f"`{reference}` has no value at `{self.fqn}`, which stands in no layer"
            raise _fault("no-layer", message, reference)
        return self._place.index if which == "index" else len(self._place.stack.layers)

    def _features(self, reference: Reference, which: str) -> int:
        value = getattr(self._module, which, None)
        if not isinstance(value, int):
            kind = type(self._module).__name__
            message = f"`{self.fqn}` has no `{which}`, it is a `{kind}`"
            raise _fault("unknown-name", message, reference)
        return value

    def _from_config(self, reference: Reference, path: list[str]) -> Value:
        value = self._config
        for part in path:
            if not hasattr(value, part):
                known = sorted(vars(value)) if value is not None else []
                close = get_close_matches(part, known, n=1)
                help = f"did you mean `{close[0]}`?" if close else None
                raise _fault(
                    "unknown-name", f"the model's config has no `{part}`", reference, help
                )
            value = getattr(value, part)
        if not isinstance(value, bool | int | float | str):
            raise _fault("wrong-type", f"`{reference}` is no number, text or truth value", reference)
        return value


def _fault(code: str, message: str, reference: Reference, help: str | None = None) -> LoraFxError:
    return LoraFxError((Diagnostic(code, message, reference.span, help=help),))
