"""The `check` statements of a spec, held against its plan."""

from collections.abc import Mapping, Sequence

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.config_values import config_value
from lora_fx.plan.modules import Modules
from lora_fx.spec.evaluate import evaluate_condition
from lora_fx.spec.expressions import Reference, Value, references, show
from lora_fx.spec.spec import Check


def failed_checks(
    checks: Sequence[Check], totals: Mapping[str, Value], modules: Modules
) -> list[Diagnostic]:
    """Return a diagnostic for each condition that does not hold, with the actual numbers.

    `totals` are the plan's own numbers by the names that checks call them.
    """

    def value(reference: Reference) -> Value:
        if reference.parts[0] == "model":
            return config_value(reference, modules.config)
        if reference.parts[0] == "layer":
            return _layer_count(reference, modules)
        return totals[str(reference)]

    failed = []
    for check in checks:
        try:
            if not evaluate_condition(check.condition, value):
                failed.append(
                    _failed(check, {str(r): value(r) for r in references(check.condition)})
                )
        except LoraFxError as error:
            failed += error.diagnostics
    return failed


def _failed(check: Check, actual: Mapping[str, Value]) -> Diagnostic:
    label = ", ".join(f"`{name}` is {_show(name, value)}" for name, value in actual.items())
    message = check.message or "the plan is not what the file says it must be"
    return Diagnostic("check-failed", message, check.condition.span, label)


def _show(name: str, value: Value) -> str:
    if name == "trainable" and isinstance(value, float):
        return f"{value:.4%}"
    return f"{value:,}" if type(value) is int else show(value)


def _layer_count(reference: Reference, modules: Modules) -> int:
    if len(modules.stacks) == 1:
        return len(modules.stacks[0].layers)
    message = f"`{reference}` has no value here"
    label = f"the model has {len(modules.stacks)} stacks of layers"
    raise LoraFxError((Diagnostic("ambiguous-stack", message, reference.span, label),))
