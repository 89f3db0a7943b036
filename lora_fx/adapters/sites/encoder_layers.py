"""torch's encoder layers, which read the weights of the layers inside them in one kernel.

In evaluation `nn.TransformerEncoderLayer` calls none of what is inside it: adapters there would be
passed by. It asks a few of its attributes whether it may; while any adapter inside adds to it, the
answer is no, and it calls its layers as it does in training.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.adapters.sites.parameter_site import parameter_sites
from lora_fx.adapters.sites.site import Site
from lora_fx.adapters.weights.own_outputs import OwnOutputs
from lora_fx.plan.modules import outside_adapters

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def _unless_adapted(name: str) -> Any:
    def read(self: "CallsItsLayers") -> Any:
        adapted = any(site.adds for site in self.lora_inside)
        mixed = any(module.mixes for module in self.lora_mixing)
        return False if adapted or mixed else vars(self)[name]

    def write(self: "CallsItsLayers", value: Any) -> None:
        vars(self)[name] = value

    return property(read, write)


class CallsItsLayers(_Base):
    """Mixin for `nn.TransformerEncoderLayer`, and for the `nn.TransformerEncoder` around it."""

    lora_inside: tuple[Site, ...] = ()
    lora_mixing: tuple[OwnOutputs, ...] = ()
    activation_relu_or_gelu = _unless_adapted("activation_relu_or_gelu")
    use_nested_tensor = _unless_adapted("use_nested_tensor")


def mark_around(model: nn.Module, fqn: str) -> None:
    """Let every encoder layer around a module call what is inside it while adapters add to it."""
    parts = fqn.split(".")
    for count in range(len(parts)):
        module = model.get_submodule(".".join(parts[:count]))
        encoder = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
        if encoder and not isinstance(module, CallsItsLayers):
            specialise(module, CallsItsLayers)


def note_sites(model: nn.Module) -> None:
    """Tell encoder layers which sites are inside them."""
    for _, module in outside_adapters(model):
        if isinstance(module, CallsItsLayers):
            below = [one for _, one in outside_adapters(module)]
            sites = [one for one in below if isinstance(one, Site)]
            sites += [site for one in below for site in parameter_sites(one).values()]
            module.lora_inside = tuple(sites)
            module.lora_mixing = tuple(one for one in below if isinstance(one, OwnOutputs))
