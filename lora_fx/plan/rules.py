"""One adapter against a model: which rule wins each attribute of each module."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.modules import Modules, can_be_adapted
from lora_fx.plan.names import Names
from lora_fx.plan.selectors import select
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.values import settle
from lora_fx.spec.evaluate import evaluate_condition
from lora_fx.spec.spec import AdapterSpec, Setting, Target


def plan_adapter(
    adapter: AdapterSpec, modules: Modules, diagnostics: list[Diagnostic]
) -> list[SitePlan]:
    """Return the sites of one adapter in module order, and note everything that is wrong.

    Per attribute the later matching rule wins; the adapter's own attributes are the defaults.
    """
    matched = _match(adapter, modules, diagnostics)
    winners = {
        fqn: _winners(adapter, [adapter.targets[i] for i in rules])
        for fqn, rules in matched.items()
    }
    diagnostics += _overridden(adapter, matched, winners)
    sites, faults = [], []
    for fqn in (fqn for fqn in modules.by_fqn if fqn in matched):
        module, rule = modules.by_fqn[fqn], adapter.targets[matched[fqn][-1]]
        if not (isinstance(module, nn.Linear) and can_be_adapted(module)):
            faults.append(_unsupported_layer(fqn, module, rule))
            continue
        try:
            names = Names(fqn, modules, winners[fqn])
            sites.append(settle(fqn, module, adapter.name, rule, names))
        except LoraFxError as error:
            faults += error.diagnostics
    if not matched and not any(d.severity == "error" for d in diagnostics):
        message = f"adapter `{adapter.name}` adapts no module of this model"
        faults.append(Diagnostic("empty-adapter", message, adapter.span))
    diagnostics += _once_each(faults)
    return sites


def _match(
    adapter: AdapterSpec, modules: Modules, diagnostics: list[Diagnostic]
) -> dict[str, list[int]]:
    """Return the numbers of the rules that match each module, in file order."""
    matched: dict[str, list[int]] = {}
    for number, target in enumerate(adapter.targets):

        def holds(fqn: str, conditions: tuple = target.selector.conditions) -> bool:
            value = Names(fqn, modules, {}).value
            return all(evaluate_condition(condition, value) for condition in conditions)

        try:
            for fqn in select(target, modules, holds, diagnostics):
                matched.setdefault(fqn, []).append(number)
        except LoraFxError as error:
            diagnostics += error.diagnostics
    return matched


def _winners(adapter: AdapterSpec, rules: Sequence[Target]) -> dict[str, Setting]:
    winners = dict(adapter.settings)
    for rule in rules:
        winners |= rule.settings
    return winners


def _overridden(
    adapter: AdapterSpec,
    matched: Mapping[str, Sequence[int]],
    winners: Mapping[str, Mapping[str, Setting]],
) -> list[Diagnostic]:
    """Return a warning for each rule none of whose values is in force where it matched."""
    warnings = []
    for number, target in enumerate(adapter.targets):
        places = [fqn for fqn, rules in matched.items() if number in rules]
        in_force = any(
            winners[fqn][name] is setting
            for fqn in places
            for name, setting in target.settings.items()
        )
        if places and target.settings and not in_force:
            message = f"no value of `target {target.selector.text}` is in force"
            label = f"later rules override it on all {len(places)} modules it matches"
            warnings.append(
                Diagnostic("overridden-rule", message, target.span, label, severity="warning")
            )
    return warnings


def _unsupported_layer(fqn: str, module: nn.Module, rule: Target) -> Diagnostic:
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        message = f"`{kind}` modules are never called, so that they cannot be adapted yet"
        help = f'leave it out: `except "{fqn}"`'
    else:
        message = f"`{kind}` modules cannot be adapted yet, only linear layers"
        help = "narrow the pattern, or name the linear layers inside it"
    span = rule.selector.span
    return Diagnostic("unsupported-layer", message, span, f"matches `{fqn}`", help=help)


def _once_each(faults: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Say once what holds of many modules: of the first, with the number of the others."""
    alike: dict[tuple, list[Diagnostic]] = {}
    for fault in faults:
        alike.setdefault((fault.code, fault.span, fault.message), []).append(fault)
    return [_with_others(first, len(others)) for first, *others in alike.values()]


def _with_others(first: Diagnostic, others: int) -> Diagnostic:
    if not others:
        return first
    return replace(
        first, notes=(*first.notes, f"likewise at {others} more module{'s' * (others > 1)}")
    )
