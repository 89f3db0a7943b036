"""Time what a merge computes beside a copy of the same weights (M1), and PEFT's merge.

The adapted weights of some layers, bf16, with one fp32 adapter and with three that are merged at
once. A copy reads each weight and writes it once, which is the least that a merge out of place can
do. `merge_adapter` is the whole call: checks, the merge, whether all is finite, and the switch.

    python -m tests.benchmarks.merge_bandwidth [--shape llama-8b] [--layers 8] [--rank 16]
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lora_fx
from lora_fx.adapters import storage
from lora_fx.runtime.merging.tensors import merged_tensors
from tests.benchmarks import decoders as d
from tests.benchmarks.interleaved import Step, machine, milliseconds

COPY, ONE, THREE = "copy", "lora_fx, 1 adapter", "lora_fx, 3 at once"
CALL, PEFT = "merge_adapter, lora_fx", "merge_adapter, PEFT"
GOAL = 1.15
TARGETS = d.ATTENTION + d.MLP


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    base = d.frozen_base(given.shape, given.layers)
    names = ("a", "b", "c")
    target = ", ".join(TARGETS)
    spec = "lora 1\n" + "\n".join(
        f"adapter {name} {{ rank = {given.rank} init = random target {target} }}" for name in names
    )
    model: Any = lora_fx.compile(base, spec, backend=None)
    weights = [site.weight for _, site in storage.sites(model)]
    config = LoraConfig(r=given.rank, target_modules=list(TARGETS), init_lora_weights=False)
    theirs: Any = get_peft_model(d.frozen_base(given.shape, given.layers), config)  # type: ignore[arg-type]
    steps: dict[str, Step] = {
        COPY: lambda: [weight.clone() for weight in weights],  # type: ignore[dict-item, return-value]
        ONE: lambda: merged_tensors(model, names[:1]),  # type: ignore[dict-item, return-value]
        THREE: lambda: merged_tensors(model, names),  # type: ignore[dict-item, return-value]
        CALL: lambda: model.merge_adapter(["a"]),
        PEFT: lambda: theirs.merge_adapter(safe_merge=True),
    }
    undone = {CALL: model.unmerge_adapter, PEFT: theirs.unmerge_adapter}
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for name in steps:
        _time(name, steps, undone)
    for _ in track(range(given.rounds), "timing", console=Console(stderr=True)):
        for name in order.sample(list(steps), len(steps)):
            found[name].append(_time(name, steps, undone))
    size = sum(weight.nbytes for weight in weights)
    told = machine() | {
        "shape": given.shape,
        "layers": given.layers,
        "rank": given.rank,
        "MB": round(size / 1e6),
    }
    table = Table("", "ms", "/ copy", "GB/s", title=", ".join(f"{k} {v}" for k, v in told.items()))
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found[COPY], strict=True)]
        middle, ratio = statistics.median(times), statistics.median(ratios)
        table.add_row(name, f"{middle:.3f}", f"{ratio:.2f}", f"{2 * size / middle / 1e6:.0f}")
    Console(width=100).print(table)
    print(f"M1: goal {GOAL} for one adapter")
    if given.json is not None:
        given.json.write_text(json.dumps({"settings": told, "ms": found}, indent=1))


def _time(name: str, steps: Mapping[str, Step], undone: Mapping[str, Callable[[], None]]) -> float:
    """Return the milliseconds of a step; what has to be undone is undone apart."""
    if name not in undone:
        return milliseconds(steps[name], 10)
    time = milliseconds(steps[name], 1)
    undone[name]()
    return time


def arguments() -> argparse.Namespace:
    """Return what is given on the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=d.SHAPES, default="llama-8b")
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the times here")
    return made.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(arguments())
