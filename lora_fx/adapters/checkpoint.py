"""What activation checkpointing needs of a model and a backend, to save anything."""

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.stacks import find_stacks
from lora_fx.spec.spec import CompileSpec


def require_effect(compile: CompileSpec, model: nn.Module, backend: str | None) -> None:
    """Raise LoraFxError if the `checkpoint` of a spec can do nothing for this model."""
    faults = []
    if compile.checkpoint != "none" and not find_stacks(model):
        what = "layers" if compile.checkpoint == "layers" else "budget(…)"
        message = f"`checkpoint = {what}` needs a model with repeated layers; this one has none"
        help = "write `checkpoint = none`"
        faults.append(Diagnostic("no-layers", message, compile.span, help=help))
    if compile.checkpoint == "budget" and backend != "inductor":
        message = f"`checkpoint = budget(…)` has no effect with `backend={backend!r}`"
        label = "it is Inductor that decides what is kept"
        help = "leave `backend` out, or write `checkpoint = layers`"
        faults.append(Diagnostic("budget-needs-inductor", message, compile.span, label, help=help))
    if faults:
        raise LoraFxError(faults)
