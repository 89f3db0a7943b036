"""A spec against a module tree: which module gets what, and what it costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.base_merges import base_merge_faults
from lora_fx.plan.blueprint import Blueprint, blueprint_of
from lora_fx.plan.changed_weights import changed_weight_faults
from lora_fx.plan.checks import failed_checks
from lora_fx.plan.dequantized import Dequantized, dequantized_faults, dequantized_modules
from lora_fx.plan.explain import Part, explain
from lora_fx.plan.lock_differences import lock_differences
from lora_fx.plan.lora_fa import lora_fa_faults, with_frozen_A
from lora_fx.plan.memory import Memory, count_elements, estimate, merged_bytes
from lora_fx.plan.merges import merge_faults
from lora_fx.plan.modules import modules_of
from lora_fx.plan.offloaded import distinct_parameters
from lora_fx.plan.one_way import two_way_faults
from lora_fx.plan.quantization import QuantizedModule, quantized_modules
from lora_fx.plan.quantized_adapters import quantized_adapter_faults
from lora_fx.plan.replication import LayerMap
from lora_fx.plan.rules import AdapterPlan, plan_adapter
from lora_fx.plan.selectors import Selection, select
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.slots import slot_faults, slot_sizes
from lora_fx.plan.token_routing import planned_faults
from lora_fx.plan.trained import TrainedBias, TrainedModule, TrainedTokens
from lora_fx.plan.weights import with_own_targets
from lora_fx.spec.expressions import Value
from lora_fx.spec.spec import AdapterSpec, MergeSpec, Spec

if TYPE_CHECKING:
    from lora_fx.plan.activations import Activations


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model; made from shapes alone.

    `adapters` one by one, and of all of them together: `sites` in module order, a module's adapters
    in file order; `trained`, modules of which a copy is trained; `tokens`, rows of embeddings;
    `biases`, the base's own. `quantized` are modules whose weights are packed, `dequantized`
    those that are not any more when merges into the base are done, `selections` what each
    `quantize` statement selects. `stacks` are the numbers of layers in each stack, `modules`
    the classes of all modules by name, `parameters` the shapes of the base's. `base` counts their
    elements, packed weights as what they stand for. `merged_bytes` is what weights take a second
    time while all adapters are merged into them. `notes` are warnings and notes, `blueprint` is
    what the model can be built from again.
    """

    spec: Spec
    adapters: tuple[AdapterPlan, ...]
    sites: tuple[SitePlan, ...]
    trained: tuple[TrainedModule, ...]
    tokens: tuple[TrainedTokens, ...]
    biases: tuple[TrainedBias, ...]
    quantized: Mapping[str, QuantizedModule]
    dequantized: Dequantized
    layer_map: LayerMap | None
    stacks: Mapping[str, int]
    modules: Mapping[str, str]
    parameters: Mapping[str, tuple[int, ...]]
    selections: tuple[Selection, ...]
    base: int
    merged_bytes: int
    notes: tuple[Diagnostic, ...]
    blueprint: Blueprint | None
    _memory: Memory

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        of_base = (one for one in (*self.trained, *self.tokens, *self.biases) if one.trainable)
        return sum(site.trained for site in self.sites) + sum(one.parameters for one in of_base)

    @property
    def all(self) -> int:
        """All parameters: the base's, the adapters', slots', and copies, kept or trained."""
        copies = (*self.trained, *self.tokens)
        added = sum(site.parameters + site.kept for site in self.sites)
        added += slot_sizes(self.spec, self.sites)[0]
        added += sum(one.parameters for one in copies)
        return self.base + added

    def activations(
        self, batch: int, sequence: int | None = None, *, compiled: bool = True
    ) -> "Activations":
        """Estimate the bytes that a training step keeps for its backward pass.

        Of `batch` samples of `sequence` tokens, or of images or sounds of the model's own size.
        Without `compiled`, of a model that Inductor does not compile, which keeps more.
        Raises LoraFxError if the model's forward cannot be run without weights.
        """
        from lora_fx.plan.activations import estimate_activations

        return estimate_activations(self, batch, sequence, compiled)

    def memory(
        self, batch: int | None = None, sequence: int | None = None, *, compiled: bool = True
    ) -> dict[str, int]:
        """Bytes of base, adapters, gradients, the optimizer's state, and their total.

        With a batch, of the activations too, see `activations`; with `slots`, of those that are
        free when the model is compiled.
        """
        parts = asdict(self._memory)
        slots = slot_sizes(self.spec, self.sites)[1]
        parts |= {"slots": slots} if slots else {}
        if batch is not None:
            parts["activations"] = self.activations(batch, sequence, compiled=compiled).bytes
        return parts | {"total": sum(parts.values())}

    def explain(self, name: str) -> tuple[Part, ...]:
        """Say what each adapter does to a module, or a parameter, by its dotted name, and why.

        Raises LoraFxError, with the closest name, if the model has no such module.
        """
        return explain(self, name)

    def to_peft(self) -> dict[str, dict[str, Any]]:
        """Return the `LoraConfig` settings by which PEFT makes the same sites, for each adapter.

        Raises LoraFxError with everything that PEFT cannot say.
        """
        from lora_fx.plan.to_peft import to_peft

        return to_peft(self)

    def to_json(self) -> dict[str, Any]:
        """Return everything that the plan holds as plain data."""
        from lora_fx.plan.as_json import plan_to_json

        return plan_to_json(self)


def with_adapters(plan: Plan, adapters: tuple[AdapterPlan, ...], tree: nn.Module) -> Plan:
    """Return the plan with these adapters in the place of its own, of the same modules."""
    sites = {(site.name, site.adapter): site for adapter in adapters for site in adapter.sites}
    keys = ((site.name, site.adapter) for site in plan.sites)
    return replace(
        plan,
        adapters=adapters,
        sites=tuple(sites[key] for key in keys if key in sites),
        _memory=estimate(tree, adapters, plan.quantized, plan.dequantized, plan.spec),
    )


def plan_sites(spec: Spec, tree: nn.Module, layer_map: LayerMap | None = None) -> Plan:
    """Plan on a module tree whose layers are replicated already; the tree is only read.

    Raises LoraFxError with everything that is wrong.
    """
    modules = modules_of(tree)
    named = (*spec.adapters, *spec.merges)
    diagnostics = [fault for adapter in named for fault in _name_faults(adapter)]
    quantize = [select(statement, modules, diagnostics) for statement in spec.quantize]
    quantized = quantized_modules(quantize, modules, diagnostics)
    adapters = []
    for adapter in spec.adapters:
        try:
            own = with_own_targets(adapter, tree)
            planned = plan_adapter(own, modules, diagnostics, own is not adapter)
            adapters.append(with_frozen_A(planned, spec.optimizer))
        except LoraFxError as error:
            diagnostics += error.diagnostics
    dequantized = dequantized_modules(spec.merges, adapters, quantized, modules)
    packed = {fqn: module for fqn, module in quantized.items() if fqn not in dequantized}
    order = {name: i for i, name in enumerate((*modules.by_fqn, *modules.parameters))}
    plan = Plan(
        spec,
        tuple(adapters),
        tuple(sorted((s for a in adapters for s in a.sites), key=lambda site: order[site.name])),
        tuple(module for adapter in adapters for module in adapter.modules),
        tuple(tokens for adapter in adapters for tokens in adapter.tokens),
        tuple(bias for adapter in adapters for bias in adapter.biases),
        packed,
        dequantized,
        layer_map,
        {stack.fqn: len(stack.layers) for stack in modules.stacks},
        {fqn: type(module).__name__ for fqn, module in modules.by_fqn.items()},
        {name: tuple(parameter.shape) for name, parameter in modules.parameters.items()},
        tuple(quantize),
        sum(count_elements(parameter) for parameter in distinct_parameters(tree)),
        0 if _routes_tokens(spec) else merged_bytes(tree, adapters, packed),
        tuple(d for d in diagnostics if d.severity != "error"),
        blueprint_of(tree),
        estimate(tree, adapters, packed, dequantized, spec),
    )
    diagnostics += _rank_faults(plan) + slot_faults(spec, plan.sites)
    diagnostics += merge_faults(spec.merges, adapters)
    diagnostics += planned_faults(spec, adapters)
    diagnostics += changed_weight_faults(adapters, modules)
    diagnostics += quantized_adapter_faults(adapters, quantized, modules)
    diagnostics += two_way_faults(site for adapter in adapters for site in adapter.sites)
    diagnostics += lora_fa_faults(adapters, spec.optimizer)
    diagnostics += base_merge_faults(spec.merges, adapters, quantized, modules)
    diagnostics += dequantized_faults(spec.merges, adapters, dequantized, modules)
    if not any(d.severity == "error" for d in diagnostics):
        diagnostics += failed_checks(spec.checks, _totals(plan), modules)
    if any(d.severity == "error" for d in diagnostics):
        raise LoraFxError(diagnostics)
    return replace(plan, notes=(*plan.notes, *lock_differences(plan)))


def _routes_tokens(spec: Spec) -> bool:
    """Whether nothing can be merged."""
    return spec.route is not None and spec.route.arrow is not None


def _totals(plan: Plan) -> dict[str, Value]:
    return {
        "trainable": plan.trainable / plan.all if plan.all else 0.0,
        "trainable_parameters": plan.trainable,
        "sites": len(plan.sites),
        "memory": plan.memory()["total"],
    }


def _name_faults(adapter: AdapterSpec | MergeSpec) -> list[Diagnostic]:
    """Refuse names that `nn.ModuleDict`, where adapters live, needs for its own methods."""
    if not hasattr(nn.ModuleDict(), adapter.name):
        return []
    message = f"`{adapter.name}` is a name that torch keeps to itself"
    help = "give the adapter another name"
    return [Diagnostic("reserved-name", message, adapter.span, help=help)]


def _rank_faults(plan: Plan) -> list[Diagnostic]:
    """Refuse ranks that do not fit into the slots of the router."""
    largest = plan.spec.route.max_rank if plan.spec.route else None
    beyond = [site for site in plan.sites if largest is not None and site.rank > largest]
    faults = [
        Diagnostic(
            "rank-beyond-slots",
            f"rank {site.rank} does not fit into the slots of `route`",
            site.settings["rank"].span if "rank" in site.settings else site.rule,
            f"`max_rank` is {largest}; at `{site.name}`",
        )
        for site in beyond
    ]
    return once_each(faults)
