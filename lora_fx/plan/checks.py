"""The `check` statements of a spec, held against its plan."""

from typing import TYPE_CHECKING

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.evaluate import evaluate
from lora_fx.spec.expressions import Reference, Value, references
from lora_fx.spec.spec import Spec

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan


def failed_checks(spec: Spec, plan: "Plan") -> list[Diagnostic]:
    """Return a diagnostic for each condition that does not hold, with the actual numbers.

    `trainable` is the share of all parameters that is trained, `trainable_parameters` their
    number, `sites` the number of adapted modules, `memory` bytes, `layer.count` the layers of the
    only stack.
    """
    values: dict[str, Value] = {
        "trainable": plan.trainable / plan.all if plan.all else 0.0,
        "trainable_parameters": plan.trainable,
        "sites": len(plan.sites),
        "memory": plan.memory()["total"],
    }
    if len(plan.stacks) == 1:
        values["layer.count"] = next(iter(plan.stacks.values()))

    def value(reference: Reference) -> Value:
        if str(reference) not in values:
            message = f"`{reference}` has no value in a check of this model"
            help = "the names are " + ", ".join(f"`{name}`" for name in values)
            raise LoraFxError((Diagnostic("unknown-name", message, reference.span, help=help),))
        return values[str(reference)]

    failed = []
    for check in spec.checks:
        try:
            if evaluate(check.condition, value) is not True:
                actual = {str(r): value(r) for r in references(check.condition)}
                label = ", ".join(f"{name} is {_show(number)}" for name, number in actual.items())
                message = check.message or "the condition does not hold"
                failed.append(Diagnostic("check-failed", message, check.condition.span, label))
        except LoraFxError as error:
            failed += error.diagnostics
    return failed


def _show(value: Value) -> str:
    if isinstance(value, float) and 0 < value < 1:
        return f"{value:.4%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
