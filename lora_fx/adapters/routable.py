"""What adapters have that cannot differ from sample to sample yet."""

from torch import nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.weights import own_outputs
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.offloaded import offload_hook
from lora_fx.plan.plan import Plan


def require_separable(tree: nn.Module, plan: Plan) -> None:
    """Raise LoraFxError if a copy of a module cannot differ from sample to sample, in any call."""
    faults = []
    for trained in plan.trained:
        for module in storage.base_modules(tree.get_submodule(trained.fqn), itself=True).values():
            why = own_outputs.why_never(module)
            if why is not None:
                message = f"`{type(module).__name__}` cannot differ from sample to sample, {why}"
                label = f"matches `{trained.fqn}`"
                help = "train the modules inside it, or leave out `route`"
                faults.append(Diagnostic("not-routable", message, trained.rule, label, help=help))
    if faults:
        raise LoraFxError(once_each(faults))


def unroutable(model: nn.Module, training: bool) -> list[Diagnostic]:
    """Return a fault for each adapter that a mixed batch cannot have."""
    found: dict[str, str] = {}
    found |= dict(own_outputs.unroutable(model, training))
    for fqn, holder in token_rows.holders(model):
        if offload_hook(holder) is not None:
            found |= dict.fromkeys(
                holder.lora_tokens, f"trains rows of `{fqn}`, which is offloaded"
            )
    return [
        Diagnostic(
            "not-routable",
            f"`{name}` {what}, which cannot differ from sample to sample yet",
            help="call the model with one adapter at a time: `set_adapter`",
        )
        for name, what in found.items()
    ]
