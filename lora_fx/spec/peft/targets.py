"""What a PEFT config adapts, as `target` statements without settings."""

from collections.abc import Iterator

from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.known import Known
from lora_fx.spec.peft.patterns import Pattern, ranges
from lora_fx.spec.peft.rule import Rule


def target_rules(config: PeftConfig) -> list[Rule]:
    """Return the statements for a model that is not known."""
    patterns, excepts = _patterns(config), _excepts(config)
    indices = _layers(config)
    rules = []
    if patterns:
        layers = f"in layers[{ranges(indices)}]" if indices else ""
        rules.append(Rule(patterns, excepts, layers))
    if patterns and indices:
        # PEFT takes a module of just this name whatever its layer.
        names = tuple(Pattern("exact", name) for name in config.get("target_modules"))
        rules.append(Rule(names, excepts))
    parameters = _parameters(config)
    return [*rules, Rule(parameters)] if parameters else rules


def target_rules_on(known: Known) -> list[Rule]:
    """Return the statements that select on a model just what PEFT adapts there."""
    parameters = _parameters(known.config)
    return [
        *known.first_exact(_candidates(known), known.sites),
        *known.first_exact([[Rule(parameters)]] if parameters else [], known.parameters),
    ]


def _candidates(known: Known) -> Iterator[list[Rule]]:
    config = known.config
    whole = tuple(known.shortest(pattern) for pattern in _patterns(config))
    yield from _narrowed(known, whole)
    if whole != _patterns(config):
        yield from _narrowed(known, _patterns(config))


def _narrowed(known: Known, patterns: tuple[Pattern, ...]) -> Iterator[list[Rule]]:
    config = known.config
    excepts, wanted = _excepts(config), _layers(config)
    if not wanted:
        yield [Rule(patterns, excepts)]
        return
    stacks = known.model.stacks
    rules = []
    for stack, count in stacks.items():
        indices = ranges([index for index in wanted if index < count])
        of = "" if len(stacks) == 1 else f' of "{stack}"'
        rules += [Rule(patterns, excepts, f"in layers{of}[{indices}]")] if indices else []
    yield rules
    names = [name for name in config.get("target_modules") if name in known.sites]
    yield [*rules, Rule(tuple(Pattern("exact", name) for name in names), excepts)] if names else []


def _patterns(config: PeftConfig) -> tuple[Pattern, ...]:
    wanted = config.get("target_modules", [])
    if isinstance(wanted, list):
        return tuple(Pattern("ending", name) for name in wanted)
    return (Pattern("linear") if wanted.lower() == "all-linear" else Pattern("regex", wanted),)


def _parameters(config: PeftConfig) -> tuple[Pattern, ...]:
    wanted = config.get("target_parameters", [])
    return tuple(Pattern("ending", name, parameter=True) for name in wanted)


def _excepts(config: PeftConfig) -> tuple[Pattern, ...]:
    excluded = config.get("exclude_modules", [])
    if isinstance(excluded, str):
        return (Pattern("regex", excluded),) if excluded else ()
    return tuple(Pattern("ending", name) for name in excluded)


def _layers(config: PeftConfig) -> list[int]:
    wanted = config.get("layers_to_transform", [])
    return [wanted] if isinstance(wanted, int) else wanted
