"""A spec against a module tree: which module gets what, and what it costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.checks import failed_checks
from lora_fx.plan.memory import Memory, count_elements, estimate
from lora_fx.plan.modules import modules_of
from lora_fx.plan.replication import LayerMap
from lora_fx.plan.rules import plan_adapter
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Value
from lora_fx.spec.spec import AdapterSpec, Spec


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model; made from shapes alone.

    `sites` in module order, a module's adapters in file order. `notes` are warnings and notes.
    `base` counts the base model's parameters, packed 4-bit weights as what they stand for.
    """

    spec: Spec
    sites: tuple[SitePlan, ...]
    layer_map: LayerMap | None
    stacks: Mapping[str, int]
    base: int
    notes: tuple[Diagnostic, ...]
    _memory: Memory

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        return sum(site.parameters for site in self.sites if site.trainable)

    @property
    def all(self) -> int:
        """All parameters, the adapters included."""
        return self.base + sum(site.parameters for site in self.sites)

    def memory(self) -> dict[str, int]:
        """Bytes of base, adapters, gradients, AdamW's state, and their total."""
        return asdict(self._memory) | {"total": self._memory.total}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "sites": [_site(site) for site in self.sites],
            "layer_map": asdict(self.layer_map) if self.layer_map else None,
            "trainable": self.trainable,
            "all": self.all,
            "memory": self.memory(),
        }


def plan_sites(spec: Spec, tree: nn.Module, layer_map: LayerMap | None = None) -> Plan:
    """Plan on a module tree whose layers are replicated already; the tree is only read.

    Raises LoraFxError with everything that is wrong.
    """
    modules = modules_of(tree)
    diagnostics = [fault for adapter in spec.adapters for fault in _name_faults(adapter)]
    planned = [
        site for adapter in spec.adapters for site in plan_adapter(adapter, modules, diagnostics)
    ]
    order = {fqn: i for i, fqn in enumerate(modules.by_fqn)}
    sites = tuple(sorted(planned, key=lambda site: order[site.fqn]))
    plan = Plan(
        spec,
        sites,
        layer_map,
        {stack.fqn: len(stack.layers) for stack in modules.stacks},
        sum(count_elements(parameter) for parameter in tree.parameters()),
        tuple(d for d in diagnostics if d.severity != "error"),
        estimate(tree, sites),
    )
    if not any(d.severity == "error" for d in diagnostics):
        diagnostics += failed_checks(spec.checks, _totals(plan), modules)
    if any(d.severity == "error" for d in diagnostics):
        raise LoraFxError(diagnostics)
    return plan


def _totals(plan: Plan) -> dict[str, Value]:
    return {
        "trainable": plan.trainable / plan.all if plan.all else 0.0,
        "trainable_parameters": plan.trainable,
        "sites": len(plan.sites),
        "memory": plan.memory()["total"],
    }


def _name_faults(adapter: AdapterSpec) -> list[Diagnostic]:
    """Refuse names that `nn.ModuleDict`, where adapters live, needs for its own methods."""
    if not hasattr(nn.ModuleDict(), adapter.name):
        return []
    message = f"`{adapter.name}` is a name that torch keeps to itself"
    help = "give the adapter another name"
    return [Diagnostic("reserved-name", message, adapter.span, help=help)]


def _site(site: SitePlan) -> dict[str, Any]:
    plain = {k: v for k, v in vars(site).items() if k not in ("rule", "provenance")}
    places = {k: f"{s.source.name}:{s.line}" for k, s in site.provenance.items()}
    return plain | {"rule": f"{site.rule.source.name}:{site.rule.line}", "provenance": places}
