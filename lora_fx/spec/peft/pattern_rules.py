"""`rank_pattern` and `alpha_pattern` as `target` statements.

In PEFT the first key that fits a name wins, here the last statement; so they come in reverse.
None of them may adapt more than the config's targets.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_fx.spec.expressions import quote, show
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.known import Known
from lora_fx.spec.peft.matching import fits
from lora_fx.spec.peft.patterns import Pattern, dotted_name
from lora_fx.spec.peft.rule import Rule


@dataclass(frozen=True)
class Unused:
    """A key that is about none of the targets, which PEFT ignores."""

    key: str

    def text(self) -> str:
        """Return a comment that says so."""
        return f"# a pattern that fits no target: {quote(self.key)}"


def pattern_rules(config: PeftConfig, targets: list[Rule]) -> list[Rule | Unused]:
    """Return the statements for a model that is not known, after those of its targets."""
    found: list[Rule | Unused] = []
    for key, settings in _settings(config):
        narrowed = [rule.narrowed(key) for rule in targets]
        rules = [replace(rule, settings=settings) for rule in narrowed if rule is not None]
        found += rules or [Unused(key)]
    return _joined(found)


def pattern_rules_on(known: Known, targets: list[Rule]) -> list[Rule | Unused]:
    """Return the statements for a known model, after those of its targets."""
    found: list[Rule | Unused] = []
    seen: list[frozenset[str]] = []
    for key, settings in _settings(known.config):
        wanted = [_fitting(key, names) for names in (known.sites, known.parameters)]
        rules = [
            rule
            for parameter, names in zip((False, True), wanted, strict=True)
            for rule in known.first_exact(_candidates(key, known, targets, parameter), names)
        ]
        found += [replace(rule, settings=settings) for rule in rules] or [Unused(key)]
        seen += wanted
    if sum(map(len, seen)) == len(frozenset().union(*seen)):
        found = _alike_together(found)
    return _joined(found)


def _settings(config: PeftConfig) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield every key with what it sets, the first one last; rank and alpha at once if possible."""
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    keys = dict.fromkeys([*ranks, *alphas])
    if [key for key in keys if key in alphas] == list(alphas):
        both = [(key, {"rank": ranks, "alpha": alphas}) for key in keys]
    else:
        both = [(key, {"rank": ranks}) for key in ranks]
        both += [(key, {"alpha": alphas}) for key in alphas]
    for key, tables in reversed(both):
        yield key, {name: show(table[key]) for name, table in tables.items() if key in table}


def _candidates(
    key: str, known: Known, targets: Iterable[Rule], parameter: bool
) -> Iterator[list[Rule]]:
    """Yield statements that may be about just what the key is about, the most readable first."""
    name = dotted_name(key.removeprefix(r".*\."))
    if name is not None:
        ending = Pattern("ending", name, parameter)
        yield from (
            [Rule((pattern,))] for pattern in dict.fromkeys((known.shortest(ending), ending))
        )
    narrowed = (rule.narrowed(key) for rule in targets if rule.parameter == parameter)
    yield [rule for rule in narrowed if rule is not None]
    if not parameter:
        yield [Rule((Pattern("regex", rf"(.*\.)?({key})"),))]


def _fitting(key: str, names: frozenset[str]) -> frozenset[str]:
    return frozenset(name for name in names if fits(key, name))


def _alike_together(rules: list[Rule | Unused]) -> list[Rule | Unused]:
    """Order rules that have no site in common, whose order thus means nothing, by settings."""
    groups: dict[str, list[Rule | Unused]] = {}
    for rule in rules:
        settings = str(rule.settings) if isinstance(rule, Rule) else ""
        groups.setdefault(settings, []).append(rule)
    return [rule for group in groups.values() for rule in group]


def _joined(rules: list[Rule | Unused]) -> list[Rule | Unused]:
    """Make neighbours that differ in nothing but their patterns one statement."""
    found: list[Rule | Unused] = []
    for rule in rules:
        last = found[-1] if found else None
        if isinstance(rule, Rule) and isinstance(last, Rule) and _alike(rule, last):
            found[-1] = replace(last, patterns=(*rule.patterns, *last.patterns))
        else:
            found.append(rule)
    return found


def _alike(a: Rule, b: Rule) -> bool:
    return replace(a, patterns=()) == replace(b, patterns=()) and a.parameter == b.parameter
