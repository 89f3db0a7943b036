"""Time `lora-fx check` from process start to exit, beside a bare Python.

Runs are interleaved; median, fastest and slowest. "no cache" builds the grammar's tables, as the
first start on a machine does.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
CHECK = [sys.executable, "-c", "from lora_fx.cli import main; main()", "check"]


def main(file: Path, rounds: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as cache:
        candidates = {
            "python -c pass": ([sys.executable, "-c", "pass"], cache),
            "lora-fx check": ([*CHECK, str(file)], cache),
            "lora-fx check, no cache": ([*CHECK, str(file)], os.devnull),
        }
        for command, folder in candidates.values():
            seconds(command, folder)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for name, (command, folder) in candidates.items():
                times[name].append(seconds(command, folder))
    table = Table(file.name, "median", "min", "max", title=f"whole processes, s, {rounds} runs")
    for name, all_ in times.items():
        table.add_row(name, *(f"{f(all_):.3f}" for f in (statistics.median, min, max)))
    Console().print(table)


def seconds(command: list[str], cache: str) -> float:
    environment = os.environ | {"LORA_FX_CACHE": cache, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "examples" / "quickstart.lora")
    parser.add_argument("--rounds", type=int, default=40)
    main(**vars(parser.parse_args()))
