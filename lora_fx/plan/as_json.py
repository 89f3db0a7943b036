"""A plan as plain data: everything it holds, in its own order."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from lora_fx.diagnostics import Span, to_json
from lora_fx.plan.lock import identity_of
from lora_fx.plan.selectors import Selection
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word, show

if TYPE_CHECKING:
    from lora_fx.plan.plan import Plan
    from lora_fx.plan.rules import AdapterPlan


def plan_to_json(plan: "Plan") -> dict[str, Any]:
    """Return a plan in JSON's types: places are `file:line`, words as they are written."""
    return {
        "model": identity_of(plan.blueprint),
        "trainable": plan.trainable,
        "all": plan.all,
        "base": plan.base,
        "memory": plan.memory(),
        "merged_bytes": plan.merged_bytes,
        "adapters": [_adapter(adapter) for adapter in plan.adapters],
        "sites": [_site(site) for site in plan.sites],
        "trained": [_plain(module) for module in plan.trained],
        "tokens": [_plain(tokens) | {"parameters": tokens.parameters} for tokens in plan.tokens],
        "biases": [_plain(bias) for bias in plan.biases],
        "quantized": [_plain(module) for module in plan.quantized.values()],
        "dequantized": list(plan.dequantized),
        "selections": [_selection(selection) for selection in plan.selections],
        "layer_map": _plain(plan.layer_map),
        "stacks": dict(plan.stacks),
        "route": _plain(plan.spec.route),
        "merges": _plain(plan.spec.merges),
        "optimizer": _plain(plan.spec.optimizer),
        "modules": dict(plan.modules),
        "parameters": _plain(plan.parameters),
        "notes": to_json(plan.notes)["diagnostics"],
    }


def _adapter(adapter: "AdapterPlan") -> dict[str, Any]:
    selections = [_selection(selection) for selection in adapter.selections]
    return {"name": adapter.name, "bias": adapter.bias, "selections": selections}


def _selection(selection: Selection) -> dict[str, Any]:
    return {
        "rule": _plain(selection.statement.span),
        "text": selection.text,
        "names": list(selection.names),
        "left_out": _plain(selection.left_out),
    }


def _site(site: SitePlan) -> dict[str, Any]:
    values = _plain(site)
    layer = values.pop("layer")
    del values["settings"]
    of_all = {"parameters": site.parameters, "provenance": _plain(site.provenance)}
    return values | layer | of_all


def _plain(value: Any) -> Any:
    match value:
        case Span():
            return f"{value.source.name}:{value.line}"
        case Word():
            return show(value)
        case Mapping():
            return {name: _plain(one) for name, one in value.items()}
        case frozenset():
            return sorted(value)
        case tuple() | list():
            return [_plain(one) for one in value]
        case _ if is_dataclass(value):
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        case _:
            return value
