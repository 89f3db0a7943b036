"""The unit of a model that is compiled ahead: runs it, and keeps every graph that it takes."""

from typing import Any

import torch
from torch import nn

from lora_fx.runtime.artifact.ahead import AheadFunction, compile_ahead, writable
from lora_fx.runtime.units.unit import Unit


class Recorder:
    """Calls the graphs it has and compiles those it has not.

    From a graph on that torch cannot write down, a program is compiled as always; Inductor's own
    cache keeps that.
    """

    def __init__(self, unit: Unit) -> None:
        self._given = unit
        self.functions: list[tuple[AheadFunction, bool, bool]] = []
        self.module: nn.Module | None = None
        self.begin()

    def begin(self) -> None:
        """Forget which sizes have been seen: another program begins."""
        self._unit = Unit(self._given.backend, self._given.dynamic)
        self._entry = self._unit.entry(writable)
        self._begun = len(self.functions)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward."""
        self.module = module
        call = module, args, kwargs
        for function, _, _ in self.functions[self._begun :]:
            if function.matches(*call):
                return function(*call)
        function = compile_ahead(self._entry, call) if self._entry is not None else None
        if function is None:
            self._entry = None
            return self._unit(*call)
        self.functions.append((function, module.training, torch.is_grad_enabled()))
        return function(*call)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave it out where guards are written down, with the module that they are about."""
        return object, ()
