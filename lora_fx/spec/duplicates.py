"""What may stand in a file once, and names that may be given once."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from lora_fx.diagnostics import Diagnostic
from lora_fx.spec import syntax

_Part = TypeVar("_Part")
_Named = TypeVar("_Named", syntax.Let, syntax.Preset, syntax.Adapter, syntax.Merge)


class Duplicates:
    """Keep the first of several and note the others."""

    def __init__(self, diagnostics: list[Diagnostic]) -> None:
        self._diagnostics = diagnostics

    def only(self, statements: Sequence[_Part], what: str) -> _Part | None:
        """Return the first of the statements, None if there is none."""
        for again in statements[1:]:
            message = f"`{what}` stands in a file once"
            self.report("duplicate-statement", message, again, statements[0])
        return statements[0] if statements else None

    def by_name(self, statements: Iterable[_Named], what: str) -> dict[str, _Named]:
        """Return the statements by their names, of those with the same name the first."""
        first: dict[str, _Named] = {}
        for part in statements:
            name = part.name.text
            if first.setdefault(name, part) is not part:
                message = f"{what} `{name}` is there already"
                self.report("duplicate-name", message, part.name, first[name].name)
        return first

    def distinct(
        self, adapters: dict[str, syntax.Adapter], merges: dict[str, syntax.Merge]
    ) -> None:
        """Note names that an adapter and a merge share."""
        for name in adapters.keys() & merges.keys():
            message = f"`{name}` is an adapter and a merge"
            self.report("duplicate-name", message, merges[name].name, adapters[name].name)

    def report(self, code: str, message: str, again: Any, first: Any) -> None:
        """Note that `again` says a second time what `first` says."""
        there = ((first.span, "the first one"),)
        self._diagnostics.append(Diagnostic(code, message, again.span, secondary=there))
