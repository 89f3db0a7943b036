"""Time `compile` of a Llama-3-8B, 224 sites of rank 16, before anything runs, by its stages.

The initialisation's own arithmetic, which draws 42 million numbers, stands apart. Beside PEFT's
`get_peft_model`. The base takes no memory. Rounds are interleaved; medians, fastest and slowest.

    python -m tests.benchmarks.bind_time
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lora_fx
from lora_fx.compiler import bind, compile
from lora_fx.runtime import starts
from tests.benchmarks.hollow import SITES, hollow_llama, spec

STAGES = {
    (compile, "parse"): "reading the spec",
    (compile, "clone"): "a second module tree",
    (compile, "plan_sites"): "plan",
    (starts, "initialise"): "initialisation's arithmetic",
    (bind, "bind"): "bind",
    (compile, "make_root"): "root",
}
GOAL = 1.0


class Stages:
    """Seconds spent in each function that `compile` calls, what they call of each other apart."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES.values(), 0.0)
        self._inside: list[str] = []
        for (module, name), stage in STAGES.items():
            setattr(module, name, self._timed(stage, getattr(module, name)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.pop()
                seconds = time.perf_counter() - start
                self.seconds[name] += seconds
                if self._inside:
                    self.seconds[self._inside[-1]] -= seconds

        return timed


def main(rounds: int, out: Path | None) -> None:
    """Print the table."""
    found: list[dict[str, float]] = []
    stages = Stages()
    base = hollow_llama()
    for _ in track(range(rounds), "timing", console=Console(stderr=True)):
        stages.seconds = own = dict.fromkeys(STAGES.values(), 0.0)
        whole = seconds(lambda: compiled(base))
        units = whole - sum(own.values())
        found.append(own | {"units to compile, and all else": units, "lora_fx.compile": whole})
        found[-1]["beyond the initialisation"] = whole - own["initialisation's arithmetic"]
        given = hollow_llama()
        found[-1]["PEFT's get_peft_model"] = seconds(lambda model=given: peft(model))
    title = f"s; Llama-3-8B, {SITES} sites, rank 16, float32, {rounds} rounds"
    table = Table("", "median", "min", "max", title=title)
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    for name, median in middle.items():
        times = [one[name] for one in found]
        table.add_row(name, f"{median:.3f}", f"{min(times):.3f}", f"{max(times):.3f}")
    Console().print(table)
    print(f"beyond the initialisation: {middle['beyond the initialisation']:.3f} (goal ≤ {GOAL})")
    if out:
        out.write_text(json.dumps({"rounds": found, "median": middle}, indent=2))


def compiled(base: Any) -> None:
    model = lora_fx.compile(base, spec())
    assert len(model.lora_fx_plan.sites) == SITES


def peft(base: Any) -> None:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, dest="out", help="also write every number there")
    main(**vars(parser.parse_args()))
