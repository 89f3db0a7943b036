"""The graphs of a model that is built from its config alone."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.weights.mergeable import require_mergeable, require_variants
from lora_fx.compiler.capture import capture
from lora_fx.compiler.compile import compile
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph.program import Program
from lora_fx.plan.skeleton import tree_of
from lora_fx.plan.stacks import find_stacks
from lora_fx.runtime.merging.program import merge_program
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


def merge_text(spec_path: Path, model: str | None, layer: int) -> str:
    """Return the program that merges the first adapter into one layer (or the whole model).

    Raises LoraFxError for anything wrong with spec, model or layer, and for what cannot be merged.
    """
    spec = parse(spec_path)
    compiled = compile(tree_of(model, spec), spec, backend=None)
    adapters = tuple(adapter.name for adapter in spec.adapters[:1])
    planned_adapters: Any = compiled.lora_fx_plan.adapters  # type: ignore[union-attr]
    require_variants(planned_adapters[:1], ("lora", "velora"))
    require_mergeable(compiled, adapters)
    within = _layer(compiled, layer) if spec.compile.unit == "layers" else ""
    sites = {
        fqn: site
        for fqn, site in storage.sites(compiled)
        if fqn.startswith(f"{within}." if within else "")
        and any(a in site.lora_branches and not site.lora_branches[a].tied for a in adapters)
    }
    plan: Any = compiled.lora_fx_plan
    planned = {(site.name, site.adapter): site for site in plan.sites}
    return merge_program(sites, adapters, planned, within).text("fused")


def _layer(model: nn.Module, index: int) -> str:
    layers = [f"{stack.fqn}.{i}" for stack in find_stacks(model) for i in range(len(stack.layers))]
    if index not in range(len(layers)):
        message = f"there is no layer {index}: the model has {len(layers)}"
        raise LoraFxError((Diagnostic("no-such-layer", message),))
    return layers[index]


def _inputs(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        message = f"`{type(model).__name__}` takes no `input_ids`; its graph cannot be shown yet"
        raise LoraFxError((Diagnostic("no-example-input", message),))
    ids = torch.ones(_SAMPLES, _TOKENS, dtype=torch.long, device="meta")
    return {"input_ids": ids} | ({"use_cache": False} if "use_cache" in parameters else {})
