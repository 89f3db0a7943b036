"""torch's encoder layers, which read the weights of the layers inside them in one kernel.

In evaluation `nn.TransformerEncoderLayer` calls none of what is inside it: adapters there would be
passed by. It asks a few of its attributes whether it may; while any adapter inside is active, the
answer is no, and it calls its layers as it does in training.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.site import Site
from lora_fx.plan.modules import outside_adapters

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def _while_at_rest(name: str) -> Any:
    def read(self: "CallsItsLayers") -> Any:
        return vars(self)[name] if self.lora_at_rest else False

    def write(self: "CallsItsLayers", value: Any) -> None:
        vars(self)[name] = value

    return property(read, write)


class CallsItsLayers(_Base):
    """Mixin for `nn.TransformerEncoderLayer`, and for the `nn.TransformerEncoder` around it."""

    lora_at_rest: bool = True
    activation_relu_or_gelu = _while_at_rest("activation_relu_or_gelu")
    use_nested_tensor = _while_at_rest("use_nested_tensor")


def mark_around(model: nn.Module, fqn: str) -> None:
    """Let every encoder layer around a module call what is inside it while adapters are active."""
    parts = fqn.split(".")
    for count in range(len(parts)):
        module = model.get_submodule(".".join(parts[:count]))
        encoder = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        if encoder and not isinstance(module, CallsItsLayers):
            specialise(module, CallsItsLayers)


def activate(model: nn.Module) -> None:
    """Tell encoder layers whether adapters inside them are active."""
    for _, module in outside_adapters(model):
        if isinstance(module, CallsItsLayers):
            inside = (site for _, site in outside_adapters(module) if isinstance(site, Site))
            module.lora_at_rest = not any(site.has_active_branches for site in inside)
