"""Statements of a spec that a PEFT config cannot say, whatever the model."""

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec.spec import Spec


def unsaid(spec: Spec) -> list[Diagnostic]:
    """Return a fault for each such statement.

    `check` and `compile` say nothing about what the model computes and are passed over.
    """
    parts = [("route", spec.route), ("optimizer", spec.optimizer)]
    parts += [("quantize", part) for part in spec.quantize]
    parts += [("merge", part) for part in spec.merges]
    faults = [
        Diagnostic("peft-cannot-say", f"a PEFT config has no `{name}`", part.span)
        for name, part in parts
        if part is not None
    ]
    layers = spec.layers
    if layers is not None and layers.stack is not None:
        message = "PEFT finds the stack of layers itself; it has no `of`"
        faults.append(Diagnostic("peft-cannot-say", message, layers.span))
    if layers is not None and not layers.share:
        message = "PEFT always shares the base weights of repeated layers"
        faults.append(Diagnostic("peft-cannot-say", message, layers.span))
    return faults
