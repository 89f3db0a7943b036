"""Print what a record holds: times, ratios and memory of each candidate, and goals."""

import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.benchmarks.record import Record

NONE = "–"


@dataclass
class Goal:
    """A ratio that is wanted: at most, or at least, `bound`; None where no goal is stated."""

    number: str
    what: str
    ratio: float | None
    bound: float | None = None
    least: bool = False

    def wanted(self) -> str:
        return f"{'≥' if self.least else '≤'} {self.bound}" if self.bound else NONE

    def met(self) -> str:
        if self.ratio is None or self.bound is None:
            return NONE
        reached = self.ratio >= self.bound if self.least else self.ratio <= self.bound
        return "yes" if reached else "no"


def show(record: Record, floor: str) -> None:
    """Print a row for each candidate; ratios are to `floor`."""
    table = Table("", title=heading(record))
    for column in (
        "ms",
        "min–max",
        "ratio",
        "min–max",
        "step GiB",
        "held GiB",
        "graphs",
        "first s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name in record.names():
        table.add_row(name, *row(record, name, floor))
    for name, error in record.failed().items():
        table.add_row(name, "absent" if error.startswith("ModuleNotFound") else "failed")
        table.caption = f"{table.caption or ''}{name}: {error}\n"
    Console(width=160).print(table)


def row(record: Record, name: str, floor: str) -> list[str]:
    times, ratios = record.times(name), record.ratios(name, floor)
    graphs, more = record.fact(name, "graphs"), record.fact(name, "recompiled")
    return [
        f"{statistics.median(times):.2f}",
        f"{min(times):.2f}–{max(times):.2f}",
        *((f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}–{max(ratios):.3f}")
          if ratios else (NONE, NONE)),
        number(record.fact(name, "step"), 2),
        number(record.fact(name, "held"), 2),
        number(graphs, 0) + (f" + {more:.0f} while timed" if more else ""),
        number(record.fact(name, "first_s"), 1),
    ]  # fmt: skip


def show_goals(goals: list[Goal], stated: bool) -> None:
    """Print the goals whose candidates took part; bounds only where they are `stated`."""
    table = Table("goal", "ratio of", title="goals")
    for column in ("measured", "wanted", "met"):
        table.add_column(column, justify="right")
    for goal in goals:
        if goal.ratio is not None:
            told = (goal.wanted(), goal.met()) if stated else (NONE, NONE)
            table.add_row(goal.number, goal.what, f"{goal.ratio:.3f}", *told)
    Console(width=160).print(table)


def heading(record: Record) -> str:
    rounds = max((len(record.times(name)) for name in record.names()), default=0)
    told = (f"{key} {value}" for key, value in (record.settings | record.machine).items())
    return ", ".join((*told, f"{rounds} rounds"))


def number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
