"""Compiled units of a model that accelerate dispatched: weights come in before the unit runs.

Its hooks on the modules inside a unit cannot be compiled. They are run around the unit instead:
all of its weights come in together, and while it runs the hooks are off.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lora_fx.adapters.dynamic_class import specialise
from lora_fx.plan.offloaded import hooks_of
from lora_fx.runtime.units.unit import Compiled


def bring_in(tree: nn.Module) -> None:
    """Run the hooks inside every compiled unit of the tree around it, in place."""
    for module in list(tree.modules()):
        if isinstance(module, Compiled) and _hooked_inside(module):
            specialise(module, BroughtIn)
            module.lora_fx_hooked = _hooked_inside(module)  # type: ignore[assignment]


class BroughtIn:
    """Mixin for a unit that has hooks inside."""

    lora_fx_hooked: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the unit on the weights that its hooks bring in, on the device that they say."""
        with brought_in(self, args, kwargs) as (args, kwargs):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def brought_in(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Have the weights inside a module come in for the block, and no hook inside it run.

    Gives the arguments, on the device where the hooks want them.
    """
    hooked = [inside for inside in getattr(module, "lora_fx_hooked", ()) if hooks_of(inside)]
    with ExitStack() as stack:
        for index, inside in enumerate(hooked):
            stack.enter_context(_without_wrapper(inside))
            hook = vars(inside)["_hf_hook"]
            stack.callback(hook.post_forward, inside, None)
            if index == 0:
                args, kwargs = hook.pre_forward(inside, *args, **kwargs)
            else:
                hook.pre_forward(inside)
        yield args, kwargs


@contextmanager
def _without_wrapper(module: nn.Module) -> Iterator[None]:
    """Let the module run the `forward` of its class for the block."""
    wrapped = vars(module).pop("forward")
    try:
        yield
    finally:
        vars(module)["forward"] = wrapped


def _hooked_inside(unit: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(module for module in unit.modules() if module is not unit and hooks_of(module))
