"""One adapter against a model: which rule wins each attribute of each module."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.names import Names
from lora_fx.plan.selectors import Tree, select
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.stacks import place_of
from lora_fx.plan.values import settle
from lora_fx.spec.evaluate import evaluate
from lora_fx.spec.spec import AdapterSpec, Setting, Target


def plan_adapter(
    adapter: AdapterSpec, tree: Tree, config: Any, diagnostics: list[Diagnostic]
) -> list[SitePlan]:
    """Return the sites of one adapter in module order, and note everything that is wrong.

    Per attribute the later matching rule wins; the adapter's own attributes are the defaults.
    """

    def holds(target: Target, fqn: str) -> bool:
        names = _names(fqn, tree, config, {})
        return all(bool(evaluate(c, names.value)) for c in target.selector.conditions)

    matched: dict[str, list[Target]] = {}
    for target in adapter.targets:
        try:
            for fqn in select(target, tree, holds, diagnostics):
                matched.setdefault(fqn, []).append(target)
        except LoraFxError as error:
            diagnostics += error.diagnostics
    winners = {fqn: _winners(adapter, targets) for fqn, targets in matched.items()}
    diagnostics += _overridden(adapter, matched, winners)
    sites = []
    for fqn in (fqn for fqn in tree.modules if fqn in matched):
        module, rule = tree.modules[fqn], matched[fqn][-1]
        if not isinstance(module, nn.Linear):
            diagnostics.append(_unsupported_layer(fqn, module, rule))
            continue
        try:
            names = _names(fqn, tree, config, winners[fqn])
            sites.append(settle(fqn, module, adapter.name, rule, names))
        except LoraFxError as error:
            diagnostics += error.diagnostics
    diagnostics[:] = _without_repeats(diagnostics)
    return sites


def _names(fqn: str, tree: Tree, config: Any, settings: Mapping[str, Setting]) -> Names:
    return Names(fqn, tree.modules[fqn], place_of(fqn, tree.stacks), config, settings)


def _winners(adapter: AdapterSpec, targets: list[Target]) -> dict[str, Setting]:
    winners = dict(adapter.settings)
    for target in targets:
        winners |= target.settings
    return winners


def _overridden(
    adapter: AdapterSpec,
    matched: Mapping[str, list[Target]],
    winners: Mapping[str, Mapping[str, Setting]],
) -> list[Diagnostic]:
    """A warning for each rule none of whose values is in force anywhere it matched."""
    warnings = []
    for target in adapter.targets:
        places = [fqn for fqn, targets in matched.items() if target in targets]
        survives = any(
            winners[fqn][name] is setting
            for fqn in places
            for name, setting in target.settings.items()
        )
        if places and target.settings and not survives:
            message = f"no value of `target {target.selector.text}` is in force"
            label = f"later rules override it on all {len(places)} modules it matches"
            warnings.append(
                Diagnostic("overridden-rule", message, target.span, label, severity="warning")
            )
    return warnings


def _unsupported_layer(
    fqn: str, module: nn.Module, rule: Target
) -> Diagnostic:
    return Diagnostic(
        "unsupported-layer",
        f"a `{type(module).__name__}` cannot be adapted yet, only linear layers",
        rule.selector.span,
        f"matches `{fqn}`",
        help="narrow the pattern, or name the linear layers inside it",
    )


def _without_repeats(diagnostics: list[Diagnostic]) -> list[Diagnostic]:
    """One diagnostic per code and place: what holds of every layer is said of the first."""
    first: dict[tuple, Diagnostic] = {}
    for diagnostic in diagnostics:
        first.setdefault((diagnostic.code, diagnostic.span, diagnostic.message), diagnostic)
    return list(first.values())
