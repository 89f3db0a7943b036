"""A plan as PEFT's configs, and what they cannot say."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.peft_attention import beyond_peft
from lora_fx.plan.plan import Plan
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.expressions import Word, show
from lora_fx.spec.peft import names
from lora_fx.spec.peft.methods import has_bias, init_settings, variant_settings
from lora_fx.spec.peft.moe import taken_for_experts
from lora_fx.spec.peft.unsaid import unsaid

_ONCE = ("init", "variant", "lora_bias", "dropout", "tie", "trainable")
_NO_DROPOUT = ("embedding", "attention")  # whatever the config says
_NEVER = {"dtype": "float32", "compute": "activation", "offload": False}


def to_peft(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the `LoraConfig` settings of each adapter, by its name.

    PEFT makes of them the same sites, ranks and scalings; scales that differ, in whatever way, go
    into `alpha_pattern`. Raises LoraFxError with everything that PEFT cannot say.
    """
    faults = unsaid(plan.spec)
    for adapter in plan.adapters:
        faults += [*_differences(adapter.sites), *_never(adapter.sites), *_biased(adapter.sites)]
        faults += [*_read_otherwise(adapter, plan), *_rows_beneath(adapter)]
        for site, name, message in beyond_peft(adapter.sites):
            faults.append(_fault(message, _span(site, name), f"at `{site.name}`"))
    if faults:
        raise LoraFxError(once_each(faults))
    layers = plan.layer_map.old if plan.layer_map else None
    return {a.name: config_of(a, tuple(plan.modules), layers) for a in plan.adapters}


def config_of(
    adapter: AdapterPlan, modules: Sequence[str], layers: Sequence[int] | None
) -> dict[str, Any]:
    """Return the `LoraConfig` settings by which PEFT finds the same modules, ranks and scalings.

    `modules` are the names of all modules of the base model, `layers` the old index of each layer
    if they were repeated. Of what PEFT has one value for the adapter, it is that of the first site,
    and the largest dropout. Raises LoraFxError if PEFT has no names for what is trained as a whole.
    """
    adapted = list(dict.fromkeys(s.target for s in adapter.sites if not s.is_parameter))
    parameters = [site.name for site in adapter.sites if site.is_parameter]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "target_modules": names.targets(adapted, modules) if adapted else [],
        "bias": adapter.bias,
        "modules_to_save": _copies(adapter, modules),
        "trainable_token_indices": {rows.fqn: list(rows.ids) for rows in adapter.tokens} or None,
        "inference_mode": not any(one.trainable for one in adapter.everything),
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if layers is not None:
        config["layer_replication"] = _runs(layers)
    return config | (_values(adapter.sites) if adapter.sites else {})


def _values(sites: Sequence[SitePlan]) -> dict[str, Any]:
    first = sites[0]
    rslora = names.commonest(site.rslora for site in sites)
    _require_one_rank(sites)
    ranks = {site.target: site.rank for site in sites}
    alphas = {s.target: names.alpha_of(s.alpha, s.scaling, s.rank, rslora) for s in sites}
    r, alpha = names.commonest(ranks.values()), names.commonest(alphas.values())
    return {
        "r": r,
        "rank_pattern": names.pattern_values(ranks, r),
        "lora_alpha": alpha,
        "alpha_pattern": names.pattern_values(alphas, alpha),
        "use_rslora": rslora,
        "lora_dropout": max(site.dropout for site in sites),
        "lora_bias": first.lora_bias,
        "ensure_weight_tying": any(site.tie for site in sites),
        **init_settings(first.init),
        **variant_settings(_variant(sites)),
    }


def _require_one_rank(sites: Sequence[SitePlan]) -> None:
    """Raise LoraFxError if the matrices of one attention have ranks or scalings of their own."""
    first: dict[str, SitePlan] = {}
    for site in sites:
        other = first.setdefault(site.target, site)
        if (site.rank, site.scaling) != (other.rank, other.scaling):
            message = f"PEFT has one rank and one scaling for all of `{site.target}`"
            label = f"{site.rank} and {site.scaling:g} at `{site.name}`"
            label += f", {other.rank} and {other.scaling:g} at `{other.name}`"
            raise LoraFxError((_fault(message, site.rule, label),))


def _variant(sites: Sequence[SitePlan]) -> Word:
    """Return what PEFT has for all; LoRA is DoRA with the norms that the weights have."""
    return next((s.variant for s in sites if s.variant.name == "dora"), sites[0].variant)


def _differences(sites: Sequence[SitePlan]) -> Iterator[Diagnostic]:
    """Yield a fault for each attribute of which PEFT has one for the adapter, and this has more."""
    for name in _ONCE:
        values: dict[Any, SitePlan] = {}
        for site in (s for s in sites if name != "dropout" or s.layer.kind not in _NO_DROPOUT):
            values.setdefault(getattr(site, name), site)
        if len(values) > 1:
            first, other = list(values.values())[:2]
            message = f"PEFT has one `{name}` for the whole adapter `{first.adapter}`"
            label = (
                f"{show(getattr(other, name))} at `{other.name}`, "
                f"{show(getattr(first, name))} at `{first.name}`"
            )
            yield _fault(message, _span(other if name in other.settings else first, name), label)


def _never(sites: Sequence[SitePlan]) -> Iterator[Diagnostic]:
    for name, usual in _NEVER.items():
        site = next((s for s in sites if getattr(s, name) != usual), None)
        if site is not None:
            label = f"is {show(getattr(site, name))} at `{site.name}`"
            yield _fault(f"a PEFT config has no `{name}`", _span(site, name), label)


def _biased(sites: Sequence[SitePlan]) -> Iterator[Diagnostic]:
    """Yield a fault if B has a bias and starts as PEFT lets no B with a bias start."""
    for site in sites:
        if site.lora_bias and not has_bias(site.init):
            label = f"with `init = {show(site.init)}` at `{site.name}`"
            yield _fault(
                "PEFT has `lora_bias` with its default init only", _span(site, "init"), label
            )
            return


def _read_otherwise(adapter: AdapterPlan, plan: Plan) -> Iterator[Diagnostic]:
    """Yield a fault if PEFT takes names of single layers for those of stacked experts."""
    model_type = plan.blueprint and plan.blueprint.config.model_type
    for site in adapter.sites:
        if site.parameter is None and taken_for_experts(site.fqn, model_type):
            message = f"on a `{model_type}` PEFT takes this name for the stacked experts"
            yield _fault(message, site.rule, f"`{site.fqn}` is one layer")
            return


def _rows_beneath(adapter: AdapterPlan) -> Iterator[Diagnostic]:
    adapted = {site.fqn for site in adapter.sites}
    for rows in adapter.tokens:
        if rows.fqn in adapted:
            message = "PEFT cannot train rows of an embedding that the same adapter adapts"
            yield _fault(message, rows.rule, f"`{rows.fqn}` is adapted too")


def _span(site: SitePlan, name: str) -> Span:
    return site.settings[name].span if name in site.settings else site.rule


def _copies(adapter: AdapterPlan, modules: Sequence[str]) -> list[str] | None:
    if not adapter.modules:
        return None
    found = names.suffixes([module.fqn for module in adapter.modules], modules)
    if found is None:
        message = "PEFT names the modules that it trains by the ends of their names"
        label = "other modules' names end alike"
        raise LoraFxError((_fault(message, adapter.modules[0].rule, label),))
    return found


def _runs(layers: Iterable[int]) -> list[list[int]]:
    """Return the half-open ranges that the numbers run through."""
    layers = list(layers)
    breaks = [i for i, (a, b) in enumerate(pairwise(layers), 1) if b != a + 1]
    bounds = [0, *breaks, len(layers)]
    return [[layers[start], layers[end - 1] + 1] for start, end in pairwise(bounds)]


def _fault(message: str, span: Span, label: str) -> Diagnostic:
    return Diagnostic("peft-cannot-say", message, span, label)
