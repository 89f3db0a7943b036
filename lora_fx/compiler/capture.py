"""The graph of one layer, to be looked at."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from lora_fx.adapters.routing import Routing
from lora_fx.compiler.pipeline import prepare, rewrite
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.inputs import mark_sizes
from lora_fx.graph.program import Program
from lora_fx.runtime.loss import TokenLosses
from lora_fx.runtime.units.brought_in import brought_in
from lora_fx.runtime.units.unit import Compiled, Unit, arguments_of, routed_by


def capture(model: nn.Module, *, layer: int = 0, dynamic: bool = False, **inputs: Any) -> Program:
    """Return the graph of one layer of a compiled model, or of the whole model.

    With `unit = layers` that is layer `layer` of all compiled layers, and the model runs up to it.
    Works on meta tensors. `inputs` are those of `forward`; training mode, gradients and autocast
    are those in force; with `dynamic`, sizes of the inputs become symbols. Compiled code is not
    touched. Raises LoraFxError if there is no such layer.
    """
    units = {
        fqn: module
        for fqn, module in model.named_modules()
        if isinstance(module, Compiled) and not isinstance(module, TokenLosses)
    }
    fqn = _chosen(list(units), layer)
    graphs: list[GraphModule] = []

    def record(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        prepare(module, inputs, model)
        graphs.append(copy.deepcopy(module))
        return module.forward

    args, kwargs = arguments_of(units[fqn], list(units.values()), lambda: model(**inputs))
    if dynamic:
        mark_sizes((args, kwargs), inputs)
    routing: Routing = model.lora_fx_routing  # type: ignore[assignment]
    with (
        routing.of(*routed_by(kwargs)),
        brought_in(model.get_submodule(fqn), args, kwargs) as (args, kwargs),
    ):
        Unit(record, None)(model.get_submodule(fqn), args, kwargs)
    return Program(graphs[0], fqn, rewrite)


def _chosen(names: list[str], layer: int) -> str:
    if layer not in range(len(names)):
        message = f"there is no layer {layer}: the model has {len(names)} compiled layers"
        help = "compile with `backend` other than None" if not names else None
        raise LoraFxError((Diagnostic("no-such-layer", message, None, help=help),))
    return names[layer]
