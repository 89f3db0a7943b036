"""Let accelerate see the parameter itself where the model reads one with adapters.

Its hook asks a module for its parameters by name, to bring in their values and to take them away.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.adapters.dynamic_class import subclass
from lora_fx.adapters.sites.parameter_site import parameter_sites
from lora_fx.plan.offloaded import offload_hook

if TYPE_CHECKING:
    from accelerate.hooks import AlignDevicesHook as _Base
else:
    _Base = object


def show_parameters(module: nn.Module) -> None:
    """Make the hook of a module with adapted parameters see them as they are."""
    hook = offload_hook(module)
    if hook is not None and not isinstance(hook, SeesParameters):
        hook.__class__ = subclass(type(hook), SeesParameters)


class SeesParameters(_Base):
    """Mixin for accelerate's hook of a module with adapted parameters."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Bring in the tensors."""
        with _as_they_are(module):
            return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Take the tensors away again."""
        with _as_they_are(module):
            return super().post_forward(module, output)

    def detach_hook(self, module: nn.Module) -> Any:
        """Bring in the tensors for good."""
        with _as_they_are(module):
            return super().detach_hook(module)


@contextmanager
def _as_they_are(module: nn.Module) -> Iterator[None]:
    sites = parameter_sites(module).values()
    for site in sites:
        site.lora_shown = True
    try:
        yield
    finally:
        for site in sites:
            site.lora_shown = False
