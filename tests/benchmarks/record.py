"""What benchmarks measured, kept in a JSON file over many processes.

The file is a list of runs, one for each process. Only times of one round of one run are compared:
a ratio is the median, over the rounds that both took part in, of one time over the other.
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Run:
    """What one process measured.

    `rounds`: by candidate, milliseconds of a step. `facts`: by candidate, what was measured once
    (GiB, graphs, seconds of the first step). `failed`: the error of a candidate that did not run.
    """

    settings: dict[str, Any]
    machine: dict[str, str]
    rounds: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Record:
    """The runs of one benchmark at the same settings on the same machine and code."""

    def __init__(self, path: Path | None, settings: dict[str, Any], machine: dict[str, str]):
        self.path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else []
        found = [Run(**run) for run in known]
        self.runs = [r for r in found if r.settings == settings and r.machine == machine]
        self._others = [r for r in found if r not in self.runs]
        self.settings = settings
        self.machine = machine

    def new(self) -> Run:
        """Begin a run."""
        self.runs.append(Run(self.settings, self.machine))
        return self.runs[-1]

    def save(self) -> None:
        """Write the file, at once and whole; without a path nothing is kept."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps([asdict(r) for r in (*self._others, *self.runs)], indent=1))
        part.replace(self.path)

    def names(self) -> list[str]:
        """Return who has times, each candidate once, in the order they were built."""
        names = dict.fromkeys(name for run in self.runs for name in run.facts)
        return [name for name in names if self.times(name)]

    def lacking(self, names: Iterable[str], rounds: int) -> dict[str, int]:
        """Return how many rounds are left to do, of those that have any left."""
        left = {name: rounds - len(self.times(name)) for name in names}
        return {name: count for name, count in left.items() if count > 0}

    def times(self, name: str) -> list[float]:
        return [row[name] for row in self._rows() if name in row]

    def ratios(self, over: str, under: str) -> list[float]:
        """Return time over time, of the rounds that both took part in."""
        both = [row for row in self._rows() if over in row and under in row]
        return [row[over] / row[under] for row in both]

    def ratio(self, over: str, under: str) -> float | None:
        """Return the median ratio; None if the two never met in a round."""
        ratios = self.ratios(over, under)
        return statistics.median(ratios) if ratios else None

    def fact(self, name: str, what: str) -> float | None:
        """Return the latest value; None if there is none."""
        values = [run.facts[name][what] for run in self.runs if what in run.facts.get(name, {})]
        return values[-1] if values else None

    def failed(self) -> dict[str, str]:
        """Return the errors of those that no run has times of."""
        errors = {name: text for run in self.runs for name, text in run.failed.items()}
        return {name: text for name, text in errors.items() if not self.times(name)}

    def _rows(self) -> Iterator[dict[str, float]]:
        for run in self.runs:
            yield from run.rounds
