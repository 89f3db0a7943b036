"""The unit of a model that was loaded from an artifact: calls the graphs that were compiled."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lora_fx.runtime.artifact.ahead import AheadFunction
from lora_fx.runtime.units.unit import Unit

Modes = tuple[bool, bool]


class Precompiled:
    """Calls a compiled graph whose guards hold; else compiles, as a unit does, and says so once.

    `load` yields the graphs for a module that is training or not, with gradients or without; each
    is loaded when those before it do not match. Copies share the graphs, pickles compile anew.
    """

    def __init__(self, unit: Unit, load: Callable[[Modes], Iterator[AheadFunction]]) -> None:
        self._unit = unit
        self._load = load
        self._graphs: dict[Modes, _Graphs] = {}
        self._told = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward."""
        modes = module.training, torch.is_grad_enabled()
        if modes not in self._graphs:
            self._graphs[modes] = _Graphs(self._load(modes))
        call = module, args, kwargs
        function = self._graphs[modes].of(call)
        if function is not None:
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
        twin._graphs = self._graphs
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._unit,)


class _Graphs:
    """The graphs that have been loaded, and those that can be."""

    def __init__(self, coming: Iterator[AheadFunction]) -> None:
        self._coming = coming
        self._there: list[AheadFunction] = []

    def of(self, call: tuple[Any, ...]) -> AheadFunction | None:
        """Return the graph of a call."""
        for function in self._there:
            if function.matches(*call):
                return function
        for function in self._coming:
            self._there.append(function)
            if function.matches(*call):
                return function
        return None


def _itself(unit: Unit) -> Unit:
    return unit
