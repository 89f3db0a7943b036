"""One adapter against a model: which rule wins each attribute of each module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError, Span
from lora_fx.plan.alike import once_each
from lora_fx.plan.attention import parts_of
from lora_fx.plan.doubled_out_proj import doubled_faults
from lora_fx.plan.kinds import has_computed_weight
from lora_fx.plan.modules import Modules
from lora_fx.plan.names import Names
from lora_fx.plan.selectors import Selection, select
from lora_fx.plan.sites import SitePlan
from lora_fx.plan.trained import (
    TrainedBias,
    TrainedModule,
    TrainedTokens,
    bias_of,
    trained_biases,
    trained_modules,
    trained_tokens,
)
from lora_fx.plan.values import settle
from lora_fx.spec.spec import AdapterSpec, Setting, Target


@dataclass(frozen=True)
class AdapterPlan:
    """What one adapter adds to a model and what it trains of it, each in module order.

    `bias` is the spec's word for which biases of the base it trains, `selections` what each of its
    `target` and `train` statements selects.
    """

    name: str
    bias: str
    sites: tuple[SitePlan, ...]
    modules: tuple[TrainedModule, ...]
    tokens: tuple[TrainedTokens, ...]
    biases: tuple[TrainedBias, ...]
    selections: tuple[Selection, ...]

    @property
    def everything(self) -> tuple[SitePlan | TrainedModule | TrainedTokens | TrainedBias, ...]:
        """All parts of the adapter."""
        return (*self.sites, *self.modules, *self.tokens, *self.biases)

    def with_trainable(self, trainable: bool) -> "AdapterPlan":
        """Return the plan with all of it trained, or none of it."""
        return replace(
            self,
            sites=tuple(replace(site, trainable=trainable) for site in self.sites),
            modules=tuple(replace(module, trainable=trainable) for module in self.modules),
            tokens=tuple(replace(tokens, trainable=trainable) for tokens in self.tokens),
            biases=tuple(replace(bias, trainable=trainable) for bias in self.biases),
        )


def plan_adapter(
    adapter: AdapterSpec, modules: Modules, diagnostics: list[Diagnostic], any_rank: bool = False
) -> AdapterPlan:
    """Return what an adapter does, and note everything that is wrong.

    Per attribute the later matching rule wins; the adapter's own attributes are the defaults. What
    is trained as a whole is not adapted, nor is what stands inside it. With `any_rank` ranks may be
    larger than the layers, as in a file they may.
    """
    trains = [select(train, modules, diagnostics) for train in adapter.trains]
    copies = trained_modules(adapter, trains, modules, diagnostics)
    taken = {copy.fqn: copy.rule for copy in copies}
    targets = [select(target, modules, diagnostics, taken) for target in adapter.targets]
    matched = _matched(targets, modules)
    winners = {
        name: _winners(adapter, [adapter.targets[i] for i in rules])
        for name, rules in matched.items()
    }
    diagnostics += _overridden(adapter, matched, winners)
    faults: list[Diagnostic] = []
    sites = []
    for name in matched:
        rule = adapter.targets[matched[name][-1]]
        try:
            sites += _sites(
                name, adapter.name, rule, matched, modules, winners[name], any_rank, taken
            )
        except LoraFxError as error:
            faults += error.diagnostics
    tokens = trained_tokens(adapter, modules, copies, diagnostics)
    biases = trained_biases(adapter, sites, modules, copies)
    nothing = not (matched or copies or tokens)
    if nothing and not any(d.severity == "error" for d in diagnostics):
        message = f"adapter `{adapter.name}` adapts no module of this model"
        faults.append(Diagnostic("empty-adapter", message, adapter.span))
    diagnostics += [*once_each(faults), *doubled_faults(adapter, sites)]
    found = (tuple(sites), tuple(copies), tuple(tokens), tuple(biases))
    return AdapterPlan(adapter.name, bias_of(adapter), *found, (*targets, *trains))


def _matched(targets: Sequence[Selection], modules: Modules) -> dict[str, list[int]]:
    """Return the numbers of the rules that match each name, in file order; names in their order."""
    matched: dict[str, list[int]] = {}
    for number, target in enumerate(targets):
        for name in target.names:
            matched.setdefault(name, []).append(number)
    order = (*modules.by_fqn, *modules.parameters)
    return {name: matched[name] for name in order if name in matched}


def _sites(
    name: str,
    adapter: str,
    rule: Target,
    matched: Mapping[str, Sequence[int]],
    modules: Modules,
    settings: Mapping[str, Setting],
    any_rank: bool,
    taken: Mapping[str, Span],
) -> list[SitePlan]:
    layer, names = modules.layer(name), Names(name, modules, settings)
    if layer is None:
        raise LoraFxError((_unsupported_layer(name, modules, rule),))
    if isinstance(attention := modules.by_fqn.get(name), nn.MultiheadAttention):
        parts = [(f"{name}.{part.inside}".strip("."), part) for part in parts_of(attention)]
        for fqn, _ in parts:
            if fqn in taken:
                message = f"`{name}` is adapted, and `{fqn}` in it is trained as a whole"
                there = ((taken[fqn], "trained here"),)
                span = rule.selector.span
                raise LoraFxError((Diagnostic("cannot-apply", message, span, secondary=there),))
        return [
            settle(fqn, part.parameter, part.layer, adapter, rule, names, any_rank)
            for fqn, part in parts
        ]
    if name in modules.by_fqn:
        return [settle(name, None, layer, adapter, rule, names, any_rank)]
    fqn, _, parameter = name.rpartition(".")
    if fqn in matched:
        message = f"`{fqn}` is adapted as a module already"
        label = f"matches its `{parameter}`"
        raise LoraFxError((Diagnostic("cannot-apply", message, rule.selector.span, label),))
    return [settle(fqn, parameter, layer, adapter, rule, names)]


def _winners(adapter: AdapterSpec, rules: Sequence[Target]) -> dict[str, Setting]:
    winners = dict(adapter.settings)
    for rule in rules:
        for name, setting in rule.settings.items():
            winners[name] = replace(setting, over=winners.get(name))
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
            winners[fqn][name].span is setting.span
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


def _unsupported_layer(name: str, modules: Modules, rule: Target) -> Diagnostic:
    owner = modules.owner(name)
    kind = type(owner).__name__
    help = "narrow the pattern, or name the layers inside it"
    if name in modules.parameters:
        parameter = modules.parameters[name]
        message = f"a parameter in {parameter.dtype.itemsize * 8} bits cannot be adapted"
        if parameter.ndim not in (2, 3):
            shape = tuple(parameter.shape)
            message = f"a parameter of shape {shape} is no matrix and no stack of matrices"
        help = "narrow the pattern"
    elif has_computed_weight(owner):
        message = f"the weight of `{name}` is computed from others, so that none can be adapted"
    elif hasattr(owner, "in_features"):
        message = f"`{kind}` modules are never called, so that they cannot be adapted"
        help = f'leave it out: `except "{name}"`'
    else:
        message = f"`{kind}` modules cannot be adapted: no linear layer, embedding or convolution"
    span = rule.selector.span
    return Diagnostic("unsupported-layer", message, span, f"matches `{name}`", help=help)
