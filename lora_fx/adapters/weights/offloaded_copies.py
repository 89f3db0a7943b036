"""Let an adapter's version of a tensor stay in force where accelerate brings in the base's."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.adapters.dynamic_class import subclass
from lora_fx.adapters.weights import copies
from lora_fx.plan.offloaded import offload_hook

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook as _Base
else:
    _Base = object


def keep_in_force(module: nn.Module) -> None:
    """Make the hook of a module that has versions leave those of adapters in force."""
    hook = offload_hook(module)
    if hook is not None and not isinstance(hook, LeavesVersions):
        hook.__class__ = subclass(type(hook), LeavesVersions)


class LeavesVersions(_Base):
    """Mixin for accelerate's hook of a module that has versions."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Bring in the base's tensors, but those that an adapter has its own of."""
        own = copies.in_force(module)
        result = super().pre_forward(module, *args, **kwargs)
        copies.put(module, own)
        return result

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take the base's tensors away again."""
        own = copies.in_force(module)
        output = super().post_forward(module, output)
        copies.put(module, own)
        return output

    def detach_hook(self, module: nn.Module) -> Any:
        """Bring in the base's tensors for good."""
        own = copies.in_force(module)
        copies.activate(module, ())
        module = super().detach_hook(module)
        copies.replace_base(module)
        copies.put(module, own)
        return module
