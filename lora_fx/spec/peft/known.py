"""What a PEFT config means on a model that is known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lora_fx.spec.peft import matching
from lora_fx.spec.peft.config import PeftConfig
from lora_fx.spec.peft.model import Model
from lora_fx.spec.peft.patterns import Pattern
from lora_fx.spec.peft.rule import Rule


@dataclass(frozen=True)
class Known:
    """A config and the model it is for; the names are those that PEFT's rules give."""

    config: PeftConfig
    model: Model

    @cached_property
    def sites(self) -> frozenset[str]:
        """The modules that are adapted."""
        model = self.model
        return frozenset(matching.targets(self.config.values, model.modules, model.linears))

    @cached_property
    def parameters(self) -> frozenset[str]:
        """The parameters that are adapted."""
        return frozenset(matching.parameters(self.config.values, self.model.parameters))

    @cached_property
    def trained(self) -> frozenset[str]:
        """The modules of which a full copy is trained."""
        suffixes = matching.saved_modules(self.config.values)
        return frozenset(name for suffix in suffixes for name in self.ending(suffix))

    def ending(self, suffix: str) -> frozenset[str]:
        """Return the modules one of whose names ends so, dot or not."""
        aliases = self.model.aliases
        return frozenset(aliases[name] for name in matching.trained(suffix, aliases))

    def first_exact(
        self, candidates: Iterable[Sequence[Rule]], wanted: frozenset[str]
    ) -> list[Rule]:
        """Return the first rules that select together just the wanted names, else one listing them.

        Without wanted names no rules. What stands inside trained modules no rule adapts.
        """
        if not wanted:
            return []
        for rules in candidates:
            selections = [self.model.select(rule.selector) for rule in rules]
            found = [
                (replace(rule, optional=not selection.complete), self._adapted(selection.names))
                for rule, selection in zip(rules, selections, strict=True)
                if selection is not None
            ]
            if frozenset().union(*(names for _, names in found)) == wanted:
                return [rule for rule, names in found if names]
        return [Rule(tuple(self._in_order(wanted)), optional=False)]

    def _in_order(self, wanted: frozenset[str]) -> list[Pattern]:
        modules = [Pattern("exact", name) for name in self.model.modules]
        parameters = [Pattern("exact", name, parameter=True) for name in self.model.parameters]
        return [pattern for pattern in (*modules, *parameters) if pattern.text in wanted]

    def shortest(self, pattern: Pattern) -> Pattern:
        """Return the pattern for the end of a name as one for a name, where it is a whole one."""
        whole = pattern.kind == "ending" and "." in pattern.text
        return replace(pattern, kind="exact") if whole and pattern.text in self._names else pattern

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset((*self.model.modules, *self.model.parameters))

    def _adapted(self, names: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in names if not self.is_trained(name))

    def is_trained(self, name: str) -> bool:
        """Whether a full copy of a module, or of one around it, is trained."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self.trained for end in range(1, len(parts) + 1))
