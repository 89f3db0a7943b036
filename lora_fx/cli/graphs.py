"""The rewritten graph of a model that is built from its config alone."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.compiler import capture, compile
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.program import Program
from lora_fx.plan.skeleton import tree_of
from lora_fx.spec import parse

_SAMPLES, _TOKENS = 5, 23


def program(spec_path: Path, model: str | None, layer: int, evaluation: bool) -> Program:
    """Capture one layer (or the whole model) on the meta device, with symbolic sizes.

    Raises LoraFxError for anything wrong with spec, model or layer.
    """
    spec = parse(spec_path)
    compiled = compile(tree_of(model, spec), spec).train(not evaluation)
    with torch.set_grad_enabled(not evaluation):
        return capture(compiled, layer=layer, dynamic=True, **_inputs(compiled))


def _inputs(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        message = f"`{type(model).__name__}` takes no `input_ids`; its graph cannot be shown yet"
        raise LoraFxError((Diagnostic("no-example-input", message),))
    ids = torch.ones(_SAMPLES, _TOKENS, dtype=torch.long, device="meta")
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in parameters else {})
