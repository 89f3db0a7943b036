"""The unit of a model that was loaded from an artifact: calls the graphs that were compiled."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_fx.runtime.artifact.ahead import AheadFunction
from lora_fx.runtime.artifact.recorder import call_of
from lora_fx.runtime.unit import Unit

Modes = tuple[bool, bool]


class Precompiled:
    """Calls a compiled graph whose guards hold; else compiles, as a unit does, and says so once.

    `load` returns the graphs for a module that is training or not, with gradients or without; it is
    called when they are first needed. Copies share the graphs, pickles compile anew.
    """

    def __init__(self, unit: Unit, load: Callable[[Modes], list[AheadFunction]]) -> None:
        self._unit = unit
        self._load = load
        self._loaded: dict[Modes, list[AheadFunction]] = {}
        self._told = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward."""
        modes = module.training, torch.is_grad_enabled()
        if modes not in self._loaded:
            self._loaded[modes] = self._load(modes)
        call = call_of(module, args, kwargs)
        for function in self._loaded[modes]:
            if function.matches(*call):
                return function(*call)
        self._tell(modes)
        return self._unit(module, args, kwargs)

    def _tell(self, modes: Modes) -> None:
        if not self._told:
            self._told = True
            training, grad = ("with" if mode else "without" for mode in modes)
            message = (
                "the artifact has no compiled code for this call "
                f"({training} training mode, {grad} gradients): it is compiled now"
            )
            warnings.warn(message, stacklevel=2)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Precompiled":
        twin = Precompiled(copy.deepcopy(self._unit, memo), self._load)
        twin._loaded = self._loaded
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._unit,)


def _itself(unit: Unit) -> Unit:
    return unit
