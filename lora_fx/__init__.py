"""A declarative graph-rewrite compiler for LoRA.

Importing it loads no torch; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_fx.adapters.peft.subtract_start import (
        subtract_mutated_init as subtract_mutated_init,
    )
    from lora_fx.adapters.weights.kbit import prepare_for_kbit_training as prepare_for_kbit_training
    from lora_fx.compiler.build import build as build
    from lora_fx.compiler.capture import capture as capture
    from lora_fx.compiler.compile import compile as compile
    from lora_fx.compiler.convert import convert as convert
    from lora_fx.compiler.load import load as load
    from lora_fx.compiler.merge import merge as merge
    from lora_fx.diagnostics import Diagnostic as Diagnostic
    from lora_fx.diagnostics import LoraFxError as LoraFxError
    from lora_fx.plan import plan as plan
    from lora_fx.plan.peft import from_peft as from_peft
    from lora_fx.runtime.optimizer.make import optimizer as optimizer
    from lora_fx.runtime.routing.collator import RoutedCollator as RoutedCollator
    from lora_fx.spec import parse as parse

_HOMES = {
    "Diagnostic": "lora_fx.diagnostics",
    "LoraFxError": "lora_fx.diagnostics",
    "RoutedCollator": "lora_fx.runtime.routing.collator",
    "build": "lora_fx.compiler.build",
    "capture": "lora_fx.compiler.capture",
    "compile": "lora_fx.compiler.compile",
    "convert": "lora_fx.compiler.convert",
    "from_peft": "lora_fx.plan.peft",
    "load": "lora_fx.compiler.load",
    "merge": "lora_fx.compiler.merge",
    "optimizer": "lora_fx.runtime.optimizer.make",
    "parse": "lora_fx.spec",
    "plan": "lora_fx.plan",
    "prepare_for_kbit_training": "lora_fx.adapters.weights.kbit",
    "subtract_mutated_init": "lora_fx.adapters.peft.subtract_start",
}
__all__ = [
    "Diagnostic",
    "LoraFxError",
    "RoutedCollator",
    "build",
    "capture",
    "compile",
    "convert",
    "from_peft",
    "load",
    "merge",
    "optimizer",
    "parse",
    "plan",
    "prepare_for_kbit_training",
    "subtract_mutated_init",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `lora_fx` has no attribute `{name}`")
