"""A plan as PEFT's configs, and what they cannot say."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.plan import Plan
from lora_fx.plan.sites import SitePlan
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.expressions import Word, show
from lora_fx.spec.peft import names
from lora_fx.spec.peft.methods import init_settings, variant_settings
from lora_fx.spec.peft.unsaid import unsaid
from lora_fx.spec.spec import AdapterSpec

_ONCE = ("init", "variant", "lora_bias", "dropout", "tie", "trainable")
_NEVER = {"dtype": "float32", "compute": "activation", "offload": False}


def to_peft(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the `LoraConfig` settings of each adapter, by its name.

    PEFT makes of them the same sites, ranks and scalings; scales that differ, in whatever way, go
    into `alpha_pattern`. Raises LoraFxError with everything that PEFT cannot say.
    """
    faults = unsaid(plan.spec)
    configs = {}
    for adapter in plan.spec.adapters:
        sites = [site for site in plan.sites if site.adapter == adapter.name]
        faults += [*_differences(sites), *_never(sites)]
        if not faults:
            configs[adapter.name] = _config(plan, adapter, sites, faults)
    if faults:
        raise LoraFxError(faults)
    return configs


def _config(
    plan: Plan, adapter: AdapterSpec, sites: list[SitePlan], faults: list[Diagnostic]
) -> dict[str, Any]:
    modules = [site.fqn for site in sites if site.parameter is None]
    parameters = [site.name for site in sites if site.parameter is not None]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "target_modules": names.targets(modules, plan.modules) if modules else [],
        "bias": _bias(adapter),
        "modules_to_save": _copies(plan, adapter, faults),
        "trainable_token_indices": {
            rows.fqn: list(rows.ids) for rows in plan.tokens if rows.adapter == adapter.name
        }
        or None,
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
    if plan.layer_map is not None:
        config["layer_replication"] = _runs(plan.layer_map.old)
    return config | (_values(sites) if sites else {})


def _values(sites: list[SitePlan]) -> dict[str, Any]:
    first = sites[0]
    rslora = names.commonest(site.rslora for site in sites)
    ranks = {site.name: site.rank for site in sites}
    alphas = {s.name: names.alpha_of(s.alpha, s.scaling, s.rank, rslora) for s in sites}
    r, alpha = names.commonest(ranks.values()), names.commonest(alphas.values())
    return {
        "r": r,
        "rank_pattern": names.pattern_values(ranks, r),
        "lora_alpha": alpha,
        "alpha_pattern": names.pattern_values(alphas, alpha),
        "use_rslora": rslora,
        "lora_dropout": first.dropout,
        "lora_bias": first.lora_bias,
        "ensure_weight_tying": first.tie,
        "inference_mode": not first.trainable,
        **init_settings(first.init),
        **variant_settings(first.variant),
    }


def _differences(sites: list[SitePlan]) -> Iterator[Diagnostic]:
    """Yield a fault for each attribute of which PEFT has one for the adapter, and this has more."""
    for name in _ONCE:
        values: dict[Any, SitePlan] = {}
        for site in sites:
            values.setdefault(getattr(site, name), site)
        if len(values) > 1:
            first, other = list(values.values())[:2]
            message = f"PEFT has one `{name}` for the whole adapter `{first.adapter}`"
            label = (
                f"{show(getattr(other, name))} at `{other.name}`, "
                f"{show(getattr(first, name))} at `{first.name}`"
            )
            yield _fault(message, _span(other if name in other.settings else first, name), label)


def _never(sites: list[SitePlan]) -> Iterator[Diagnostic]:
    for name, usual in _NEVER.items():
        site = next((s for s in sites if getattr(s, name) != usual), None)
        if site is not None:
            label = f"is {show(getattr(site, name))} at `{site.name}`"
            yield _fault(f"a PEFT config has no `{name}`", _span(site, name), label)


def _span(site: SitePlan, name: str) -> Span:
    return site.settings[name].span if name in site.settings else site.rule


def _bias(adapter: AdapterSpec) -> str:
    setting = adapter.settings.get("bias")
    value = evaluate(setting.value, no_environment) if setting else Word("none")
    assert isinstance(value, Word)
    return value.name


def _copies(plan: Plan, adapter: AdapterSpec, faults: list[Diagnostic]) -> list[str] | None:
    copies = [module for module in plan.trained if module.adapter == adapter.name]
    if not copies:
        return None
    found = names.suffixes([module.fqn for module in copies], plan.modules)
    if found is None:
        message = "PEFT names the modules that it trains by the ends of their names"
        label = "other modules' names end alike"
        faults.append(_fault(message, copies[0].rule, label))
    return found


def _runs(layers: Iterable[int]) -> list[list[int]]:
    """Return the half-open ranges that the numbers run through."""
    layers = list(layers)
    breaks = [i for i, (a, b) in enumerate(pairwise(layers), 1) if b != a + 1]
    bounds = [0, *breaks, len(layers)]
    return [[layers[start], layers[end - 1] + 1] for start, end in pairwise(bounds)]


def _fault(message: str, span: Span, label: str) -> Diagnostic:
    return Diagnostic("peft-cannot-say", message, span, label)
