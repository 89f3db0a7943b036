"""The pipeline, on one screen.

spec → plan → marked model → captured graph → adapted → fused → lowered → compiled
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lora_fx.adapters.augmented import augment
from lora_fx.adapters.bind import Start, bind
from lora_fx.adapters.checkpoint import require_effect
from lora_fx.adapters.clone import clone
from lora_fx.adapters.init.batches import Batches
from lora_fx.adapters.not_yet import require_supported
from lora_fx.adapters.peft.folders import adapter_folders, local
from lora_fx.adapters.reachable import require_compilable, require_reachable
from lora_fx.adapters.undo import undone_on_error
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.graph import backends
from lora_fx.graph.inputs import mark_sizes, name_inputs, tensor_names
from lora_fx.graph.program import Program
from lora_fx.graph.verify import STAGES, Stage, verify
from lora_fx.passes.aten.accumulate_products import accumulate_products
from lora_fx.passes.aten.augment_products import augment_products
from lora_fx.passes.aten.fuse_low_rank_terms import fuse_low_rank_terms
from lora_fx.passes.aten.keep_float32 import keep_float32
from lora_fx.passes.aten.share_gradient_reads import share_gradient_reads
from lora_fx.passes.causal_attention import causal_attention
from lora_fx.passes.factor_dora_norm import factor_dora_norm
from lora_fx.passes.grouped_attention import grouped_attention
from lora_fx.passes.lower import lower
from lora_fx.passes.share_shrinks import share_shrinks
from lora_fx.plan.merge_sources import require_base_kept, require_weights
from lora_fx.plan.plan import Plan, plan_sites
from lora_fx.plan.replication import replicate_layers
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.stacks import find_stacks
from lora_fx.rewrite.driver import apply
from lora_fx.rules.expand_sites import ExpandSites
from lora_fx.runtime.artifact.base import load_model, place_of
from lora_fx.runtime.artifact.layout import is_artifact
from lora_fx.runtime.artifact.new import new_artifact
from lora_fx.runtime.artifact.read import Artifact
from lora_fx.runtime.artifact.write import write_artifact
from lora_fx.runtime.brought_in import bring_in, brought_in
from lora_fx.runtime.calibration_text import text_batches
from lora_fx.runtime.given_weights import bind_weights, read_weights
from lora_fx.runtime.loss import TokenLosses, compile_loss
from lora_fx.runtime.merge_statements import Adapters, combine_statements, run_merges
from lora_fx.runtime.progress import Report, progress_bar, silent
from lora_fx.runtime.provenance import annotate
from lora_fx.runtime.root import checkpoint_layers, make_root
from lora_fx.runtime.saved_spec import frame_of, restore_arithmetic
from lora_fx.runtime.starts import starts
from lora_fx.runtime.streamed.mapped_model import map_model
from lora_fx.runtime.streamed.write_merges import require_saves, write_merges
from lora_fx.runtime.uncalled import require_called
from lora_fx.runtime.unit import Compiled, Unit, arguments_of, install_unit
from lora_fx.spec import parse
from lora_fx.spec.spec import CompileSpec, Spec, SpecLike

Backend = Literal["inductor", "eager"]
Model = TypeVar("Model", bound=nn.Module)
Given = Mapping[str, Mapping[str, Tensor]]
Giver = Callable[[nn.Module, Plan], Given]

RULES = (ExpandSites(),)
FUSE = (factor_dora_norm, share_shrinks, causal_attention, grouped_attention)
PLAIN = (share_gradient_reads, accumulate_products, fuse_low_rank_terms, keep_float32)
AUGMENTED = (*PLAIN[:2], augment_products, *PLAIN[2:])


def compile(
    model: Model,
    spec: SpecLike,
    *,
    backend: Backend | None = "inductor",
    inplace: bool = False,
    calibration: Batches | None = None,
) -> Model:
    """Return `model` with the spec's adapters, compiled on its first call.

    The given model is not changed: the result is a new module tree on the same base storage, of
    the same class, frozen but for the adapters. `inplace=True` adapts the given tree itself (for
    models whose modules carry device hooks). `backend`: `inductor`; `eager` runs the rewritten
    graphs as they are; None only marks the model, which computes the same without any compiler.
    `calibration` are batches for inits that look at data, each a mapping of `forward`'s arguments.

    Raises LoraFxError with every fault of spec and plan; nothing is half done.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    if not inplace:
        with progress_bar() as report:
            return _compiled(clone(model), spec, backend, None, calibration, report)  # type: ignore[return-value]
    with undone_on_error(model), progress_bar() as report:
        return _compiled(model, spec, backend, None, calibration, report)


def _compiled(
    tree: Model,
    spec: Spec,
    backend: Backend | None,
    given: Giver | None = None,
    calibration: Batches | None = None,
    report: Report = silent,
) -> Model:
    """Compile a tree in place; `given` has values of adapters, by their names in a PEFT folder."""
    require_effect(spec.compile, tree, backend)
    plan, units = _prepare(tree, spec, backend)
    values = (given or _weights)(tree.requires_grad_(False), plan)
    plan, start = starts(tree, plan, values, calibration, report)
    adapters = _bind(tree, plan, values, start)
    if spec.compile.layout == "augmented" and backend == "inductor":
        augment(tree)
    if backend is not None:
        unit = Unit(Pipeline(tree, backend, spec.compile), spec.compile.dynamic)
        for fqn, index in units.items():
            install_unit(tree.get_submodule(fqn), unit, index)
        if backend == "inductor" and "" not in units:
            compile_loss(tree, unit)
        bring_in(tree)
    make_root(tree, plan, adapters)
    if spec.compile.checkpoint == "layers":
        checkpoint_layers(tree, [layer for stack in find_stacks(tree) for layer in stack.layers])
    tree.lora_fx_checkpoint = spec.compile.checkpoint  # type: ignore[assignment]
    return tree


def _prepare(
    tree: nn.Module, spec: Spec, backend: Backend | None
) -> tuple[Plan, dict[str, int | None]]:
    """Replicate layers, plan, and return the plan and the units to compile, with their indices."""
    layer_map = replicate_layers(tree, spec.layers) if spec.layers else None
    plan = plan_sites(spec, tree, layer_map)
    require_supported(plan)
    require_weights(spec)
    require_reachable(tree, plan.adapters)
    units: dict[str, int | None] = {}
    if backend is not None and spec.compile.unit == "layers":
        units = {f"{s.fqn}.{i}": i for s in find_stacks(tree) for i in range(len(s.layers))}
    if backend is not None and not units:
        units = {"": None}
    require_compilable(tree, units)
    return plan, units


def _bind(tree: nn.Module, plan: Plan, given: Given, start: Start) -> Adapters:
    """Put every adapter in place, and those that merges make; return them by name.

    What is trained starts from the base that merges leave.
    """
    late = [a for a in plan.adapters if plan.spec.merges and a.name not in given]
    there: Adapters = {a.name: a for a in plan.adapters if a not in late}
    for adapter in there.values():
        _bind_one(tree, adapter, given, start)
    there = run_merges(tree, plan.spec, there)
    for adapter in late:
        _bind_one(tree, adapter, given, start)
    every = {**there, **{adapter.name: adapter for adapter in late}}
    of_file = [adapter.name for adapter in plan.adapters if adapter.name in every]
    return {name: every[name] for name in (*of_file, *every)}


def _bind_one(tree: nn.Module, adapter: AdapterPlan, given: Given, start: Start) -> None:
    if adapter.name in given:
        bind_weights(tree, adapter, given[adapter.name])
    else:
        bind(tree, adapter, start)


def _weights(tree: nn.Module, plan: Plan) -> Given:
    """Read the folder of each adapter that says `weights`."""
    layers = plan.layer_map.old if plan.layer_map else None
    named = {a.name: a.settings["weights"] for a in plan.spec.adapters if "weights" in a.settings}
    return {
        adapter.name: read_weights(adapter, named[adapter.name], tree, layers).tensors
        for adapter in plan.adapters
        if adapter.name in named
    }


class Pipeline:
    """The `torch.compile` backend of one compiled model."""

    def __init__(self, model: nn.Module, backend: Backend, compile: CompileSpec) -> None:
        self._model = model
        self._backend = backend
        self._mode = compile.mode
        self._augmented = compile.layout == "augmented"
        self._budget = 1.0 if compile.budget is None else compile.budget
        self.seen: Callable[[Program], None] | None = None  # called with each captured graph

    def __call__(self, module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Rewrite a captured graph and hand it on."""
        prepare(module, inputs, self._model)
        if self.seen is not None:
            self.seen(Program(copy.deepcopy(module), "", rewrite))
        rewrite(module, "lowered")
        if self._backend == "eager":
            return backends.eager(module)
        passes = AUGMENTED if self._augmented else PLAIN
        return backends.inductor(module, inputs, self._mode, passes, self._budget)


def build(
    spec: SpecLike,
    model: nn.Module | str | Path | None = None,
    out: str | Path = "artifact",
    *,
    force: bool = False,
    calibration: Batches | str | Path | None = None,
    report: Report = silent,
) -> Plan:
    """Write everything that is known ahead of training into the folder `out`, for `load`.

    That is the adapters as they start and, for each `entry` of the spec, compiled code and the text
    of every graph. `model` is a live model, a folder or a hub id; None is the model that the spec
    names. What is loaded goes to the GPU, if there is one. With `force` an artifact that is there
    is replaced, at once when the new one is whole. `calibration` is that of `compile`, or a text
    file, for the model's tokenizer to split. `report` hears what is being done, and how many steps
    of how many are. Returns the plan. Raises LoraFxError with every fault, and nothing is
    written.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    require_base_kept(spec)
    with new_artifact(Path(out), force) as folder:
        place = place_of(model, spec)
        if not isinstance(model, nn.Module):
            report("loading the model", 0, 1)
            model = load_model(place, "cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(calibration, str | Path):
            calibration = text_batches(Path(calibration), place, model)
        compiled = _compiled(clone(model), spec, "inductor", None, calibration, report)
        write_artifact(compiled, folder, place, report)
    return compiled.lora_fx_plan  # type: ignore[return-value]


def load(
    folder: str | Path,
    base: Model | None = None,
    *,
    backend: Backend | None = "inductor",
    is_trainable: bool = False,
    trust_cache: bool = False,
) -> Model:
    """Return `base` with the adapters of a folder: an artifact, or what `save_pretrained` wrote.

    Of an artifact, `base` is by default the model that it was made for. Adapters and settings are
    those of its spec, and so is what is trained. Its compiled code is called if this user's lora_fx
    wrote it on this machine or `trust_cache` is set, and if model, versions and processor are the
    same; else the model compiles when it first runs, and a warning says why.

    Of any other folder, PEFT's too, layer replication is that of the folder; where it holds a spec,
    so are its `compile` settings and each module's dropout and compute dtype, of which PEFT's
    config knows nothing. The adapter in the folder itself is named `default`, those below it by
    their folders; the first is active.

    Raises LoraFxError as `compile` and `load_adapter` do, and if an artifact is damaged.
    """
    if is_artifact(Path(folder)):
        return _start(Artifact.open(Path(folder)), base, backend, trust_cache)
    if base is None:
        message = f"`{folder}` holds adapters and no model"
        raise LoraFxError((Diagnostic("no-model", message, help="pass it: `base=model`"),))
    folders = adapter_folders(folder)
    frame = frame_of(local(folder), next(iter(folders.values())))
    model = compile(base, frame, backend=backend)
    for name, path in folders.items():
        model.load_adapter(path, name, is_trainable)  # type: ignore[operator]
    restore_arithmetic(model, local(folder))
    model.set_adapter(next(iter(folders)))  # type: ignore[operator]
    return model


def merge(
    spec: SpecLike,
    model: str | Path | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> list[Path]:
    """Carry out the merges of a spec and write those that say `save`; return the folders.

    What goes into the base is streamed from the model's safetensors checkpoint, of which one tensor
    is in memory at a time. A run that was cut off goes on where it was. `model` is a folder or a
    hub id; None is the model that the spec names. Each folder appears when it is whole; what is
    there is replaced only with `force`. Raises LoraFxError with every fault, and nothing is
    written.
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    require_saves(spec, force)
    report("reading the adapters", 0, 1)
    mapped = map_model(place_of(model, spec), spec)
    tree = mapped.tree
    plan, _ = _prepare(tree, spec, None)
    given = _weights(tree, plan)
    there = {a.name: a for a in plan.adapters if a.name in given}
    for adapter in there.values():
        bind_weights(tree, adapter, given[adapter.name])
    make_root(tree, plan, combine_statements(tree, spec, there))
    return write_merges(tree, spec, mapped.shards, report)  # type: ignore[arg-type]


def _start(
    artifact: Artifact, base: Model | None, backend: Backend | None, trust_cache: bool
) -> Model:
    tree = clone(base if base is not None else artifact.load_base(trust_cache))
    model = _compiled(tree, parse(artifact.spec), backend, artifact.adapters)
    if backend == "inductor":
        artifact.serve(model, trust_cache)
    return model  # type: ignore[return-value]


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
    with brought_in(model.get_submodule(fqn), args, kwargs) as (args, kwargs):
        Unit(record, None)(model.get_submodule(fqn), args, kwargs)
    return Program(graphs[0], fqn, rewrite)


def _chosen(names: list[str], layer: int) -> str:
    if layer not in range(len(names)):
        message = f"there is no layer {layer}: the model has {len(names)} compiled layers"
        help = "compile with `backend` other than None" if not names else None
        raise LoraFxError((Diagnostic("no-such-layer", message, None, help=help),))
    return names[layer]


def prepare(module: GraphModule, inputs: list[Any], model: nn.Module) -> None:
    """Give a captured graph the names and provenance that the model knows."""
    name_inputs(module, inputs, tensor_names(model))
    plan = model.lora_fx_plan
    annotate(module, {(site.name, site.adapter): site for site in plan.sites})  # type: ignore[union-attr]
    verify(module, "captured", "capture")
    require_called(module, inputs, model)


def rewrite(module: GraphModule, stage: Stage) -> GraphModule:
    """Take a captured graph to a stage, in place."""
    wanted = STAGES.index(stage)
    if wanted >= STAGES.index("adapted"):
        for rule in RULES:
            apply((rule,), module)
        verify(module, "adapted", "rules")
    if wanted >= STAGES.index("fused"):
        for fuse in FUSE:
            fuse(module)
            verify(module, "fused", fuse.__name__)
    if wanted >= STAGES.index("lowered"):
        lower(module)
        verify(module, "lowered", "lower")
    return module
