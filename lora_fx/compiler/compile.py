"""spec → plan → marked model, whose graphs the pipeline compiles."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from lora_fx.adapters.checkpoint import require_effect
from lora_fx.adapters.init.batches import Batches
from lora_fx.adapters.not_yet import require_supported
from lora_fx.adapters.reachable import require_compilable, require_reachable
from lora_fx.adapters.routable import require_separable
from lora_fx.adapters.row_order import require_row_order
from lora_fx.adapters.undo import undone_on_error
from lora_fx.adapters.weights.augmented import augment
from lora_fx.adapters.weights.clone import clone
from lora_fx.compiler.bind import Given, bind_adapters, weights_of
from lora_fx.compiler.pipeline import Backend, Pipeline
from lora_fx.compiler.quantise import quantise_merged, quantise_tree
from lora_fx.plan.invocable import require_invocable
from lora_fx.plan.merge_sources import require_weights
from lora_fx.plan.plan import Plan, plan_sites
from lora_fx.plan.replication import replicate_layers
from lora_fx.plan.sample_rows import require_sample_rows
from lora_fx.plan.stacks import find_stacks
from lora_fx.runtime.loss import compile_loss
from lora_fx.runtime.methods.slots import reserve_slots
from lora_fx.runtime.progress import Report, progress_bar, silent
from lora_fx.runtime.root import checkpoint_layers, make_root
from lora_fx.runtime.starts import starts
from lora_fx.runtime.units.brought_in import bring_in
from lora_fx.runtime.units.unit import Unit, install_unit
from lora_fx.spec import parse
from lora_fx.spec.spec import Spec, SpecLike

Model = TypeVar("Model", bound=nn.Module)
Giver = Callable[[nn.Module, Plan], Given]


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
            return compiled_tree(clone(model), spec, backend, None, calibration, report)  # type: ignore[return-value]
    with undone_on_error(model), progress_bar() as report:
        return compiled_tree(model, spec, backend, None, calibration, report)


def compiled_tree(
    tree: Model,
    spec: Spec,
    backend: Backend | None,
    given: Giver | None = None,
    calibration: Batches | None = None,
    report: Report = silent,
) -> Model:
    """Compile a tree in place; `given` has values of adapters, by their names in a PEFT folder."""
    require_effect(spec.compile, tree, backend)
    plan, units = plan_tree(tree, spec, backend)
    if spec.route is not None and spec.route.arrow is None:
        require_separable(tree, plan)
        require_sample_rows(plan, _routed(tree, plan))
        require_row_order(plan, plan.sites)
    require_invocable(tree, plan, plan.sites)
    values = (given or weights_of)(tree.requires_grad_(False), plan)
    plan, start = starts(tree, plan, values, calibration, report)
    if any(plan.dequantized.values()):
        quantise_merged(tree, plan)
    adapters = bind_adapters(tree, plan, values, start)
    if plan.quantized:
        quantise_tree(tree, plan, values, report)
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
    if spec.route is not None and plan.sites:
        reserve_slots(tree, spec.route, plan.sites)
    if spec.compile.checkpoint == "layers":
        checkpoint_layers(tree, [layer for stack in find_stacks(tree) for layer in stack.layers])
    tree.lora_fx_checkpoint = spec.compile.checkpoint  # type: ignore[assignment]
    return tree


def _routed(tree: nn.Module, plan: Plan) -> dict[str, None]:
    """Return the modules that compute each sample of a mixed batch by itself, by fqn."""
    of_trained = [
        f"{trained.fqn}.{inside}".rstrip(".")
        for trained in plan.trained
        for inside, module in tree.get_submodule(trained.fqn).named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    biases = [bias.name.rpartition(".")[0] for bias in plan.biases]
    fqns = (
        *(s.fqn for s in plan.sites if not s.is_parameter),
        *of_trained,
        *biases,
        *(t.fqn for t in plan.tokens),
    )
    return dict.fromkeys(fqns)


def plan_tree(
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
