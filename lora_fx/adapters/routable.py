"""What adapters have that cannot differ from sample to sample yet."""

from torch import nn

from lora_fx.adapters import storage, token_rows
from lora_fx.adapters.sites.parameter_site import ParameterSite
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic


def unroutable(model: nn.Module, training: bool) -> list[Diagnostic]:
    """Return a fault for each adapter that a mixed batch cannot have."""
    found: dict[str, str] = {}
    for fqn, module in copies.holders(model):
        found |= {name: f"trains tensors of `{fqn}`" for name in copies.adapters_of(module)}
    for fqn, holder in token_rows.holders(model):
        found |= dict.fromkeys(holder.lora_tokens, f"trains rows of `{fqn}`")
    for name, site in storage.sites(model):
        if isinstance(site, ParameterSite):
            found |= dict.fromkeys(site.lora_arithmetic, f"adapts the parameter `{name}`")
    if training:
        for fqn, site in storage.sites(model):
            for name, factors in site.lora_branches.items():
                if factors.direction is not None:
                    found[name] = f"is `velora` at `{fqn}`, and learns"
    return [
        Diagnostic(
            "not-routable",
            f"`{name}` {what}, which cannot differ from sample to sample yet",
            help="call the model with one adapter at a time: `set_adapter`",
        )
        for name, what in found.items()
    ]
