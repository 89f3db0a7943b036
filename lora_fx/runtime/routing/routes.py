"""The names that a sample of a batch can have, and what each stands for."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.slots import is_slot
from lora_fx.spec.closest import did_you_mean
from lora_fx.spec.spec import RouteSpec, Term

BASE = "__base__"
DEFAULT = -2


@dataclass(frozen=True)
class Routes:
    """Adapters by column, and names by row: adapters, then mixes.

    An empty slot is a row and a column as well, and no name.

    `table` (names + 2, adapters), float32: the shares of the adapters under each name, and behind
    them those of the spec's `default` and of the base, so that their rows are -2 and -1. Under one
    name at most `terms` adapters have a share.
    """

    adapters: tuple[str, ...]
    names: tuple[str, ...]
    table: Tensor
    terms: int

    def indices(self, names: Sequence[str]) -> list[int]:
        """Return the row of each name. Raises LoraFxError with all that are unknown."""
        self.require_known(names)
        return [self._rows[name] for name in names]

    def require_known(self, names: Sequence[str], elsewhere: Collection[str] = ()) -> None:
        """Raise LoraFxError with all names that are neither rows nor `elsewhere`."""
        unknown = [n for n in dict.fromkeys(names) if n not in self._rows and n not in elsewhere]
        if not unknown:
            return
        rows = (*self._rows, *elsewhere)
        known = ", ".join(f"`{name}`" for name in rows)
        raise LoraFxError(
            tuple(
                Diagnostic(
                    "unknown-adapter",
                    f"there is no adapter and no mix `{name}`",
                    help=did_you_mean(name, rows) or f"the names are {known}",
                )
                for name in unknown
            )
        )

    def shares(self, rows: Tensor, device: torch.device) -> Tensor:
        """Return the shares (S, adapters) under names by their rows, int (S,), on a device."""
        if rows.device not in self._tables:
            self._tables[rows.device] = self.table.to(rows.device)
        return self._tables[rows.device][rows.long()].to(device, non_blocking=True)

    def adds_to(self, rows: Tensor) -> bool:
        """Whether any adapter has a share under names by their rows, int (S,), on the host."""
        return not self._of_base.issuperset(rows.tolist())

    @cached_property
    def _of_base(self) -> frozenset[int]:
        """The rows of names under which no adapter has a share."""
        rows = (*range(len(self.names)), DEFAULT, -1)
        return frozenset(row for row in rows if not self.table[row].any())

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def _rows(self) -> dict[str, int]:
        names = ((row, name) for row, name in enumerate(self.names) if not is_slot(name))
        return {name: row for row, name in names} | {BASE: -1}

    def present(self, rows: Collection[int]) -> set[str]:
        """Return the adapters that have a share under one of these names."""
        any_share = (self.table[sorted(set(rows))] != 0).any(0)
        return {name for name, here in zip(self.adapters, any_share.tolist(), strict=True) if here}


def routes_of(adapters: Sequence[str], route: RouteSpec | None) -> Routes:
    """Return what can be named: these adapters, and the mixes of the spec that consist of them."""
    mixes = route.mixes if route else {}
    default = route.default.terms if route and route.default else ()
    named = {name: mix.terms for name, mix in mixes.items()}
    there = {n: terms for n, terms in named.items() if all(t.name in adapters for t in terms)}
    shares = [[float(one == other) for other in adapters] for one in adapters]
    shares += [_shares(terms, adapters) for terms in (*there.values(), default, ())]
    table = torch.tensor(shares, dtype=torch.float32)
    terms = max(sum(share != 0 for share in row) for row in shares)
    return Routes(tuple(adapters), (*adapters, *there), table, terms)


def _shares(terms: Sequence[Term], adapters: Sequence[str]) -> list[float]:
    weights = {term.name: term.weight for term in terms}
    return [weights.get(name, 0.0) for name in adapters]
