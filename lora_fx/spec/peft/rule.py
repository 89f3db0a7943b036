"""A `target` statement in the making."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora_fx.spec.peft.patterns import Pattern, dotted_name, folded, not_fitting


@dataclass(frozen=True)
class Rule:
    """Patterns, the clauses that narrow them, and settings as they are written.

    The patterns are all of modules or all of parameters.
    """

    patterns: tuple[Pattern, ...]
    excepts: tuple[Pattern, ...] = ()
    layers: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    optional: bool = True

    @property
    def selector(self) -> str:
        """The selector as it is written."""
        listed = ", ".join(map(str, folded(self.patterns)))
        excepts = f" except {', '.join(map(str, self.excepts))}" if self.excepts else ""
        return f"{listed}{excepts}{self.layers and f' {self.layers}'}"

    @property
    def parameter(self) -> bool:
        """Whether it is about parameters."""
        return self.patterns[0].parameter

    def text(self) -> str:
        """Return the statement."""
        settings = "  ".join(f"{name} = {value}" for name, value in self.settings.items())
        block = f" {{ {settings} }}" if settings else ""
        return f"target{'?' * self.optional} {self.selector}{block}"

    def narrowed(self, key: str) -> "Rule | None":
        """Return what of this rule a key of `rank_pattern` is about; None if nothing is.

        A `regex` that excludes all else says it where names do not.
        """
        name = dotted_name(key.removeprefix(r".*\."))
        if name is None or not all(p.kind in ("ending", "exact") for p in self.patterns):
            return replace(self, excepts=(*self.excepts, not_fitting(key)))
        patterns = [p for p in (p.ending_with(name) for p in self.patterns) if p is not None]
        if not patterns:
            return None
        if not self.parameter and key.startswith(".*"):
            # Before a module's name there may be nothing, before a parameter's is its module's.
            return replace(self, excepts=(*self.excepts, not_fitting(key)))
        return replace(self, patterns=tuple(dict.fromkeys(patterns)))
