"""Time what a merge computes beside a copy of the same weights (M1), and PEFT's merge.

One layer's adapted weights, bf16, with one fp32 adapter and with three that are merged at once. A
copy reads each weight and writes it once, which is the least that a merge out of place can do.

    python -m tests.benchmarks.merge_bandwidth [--shape llama-8b] [--rank 16] [--json FILE]
"""

import argparse
import json
import random
import statistics
import sys
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

COPY, ONE, THREE, PEFT = "copy", "lora_fx, 1 adapter", "lora_fx, 3 at once", "PEFT, 1 adapter"
GOAL = 1.15
TARGETS = d.ATTENTION + d.MLP


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    base = d.frozen_base(given.shape, 1)
    names = ("a", "b", "c")
    target = ", ".join(TARGETS)
    spec = "lora 1\n" + "\n".join(
        f"adapter {name} {{ rank = {given.rank} init = random target {target} }}" for name in names
    )
    model: Any = lora_fx.compile(base, spec, backend=None)
    weights = [site.weight for _, site in storage.sites(model)]
    config = LoraConfig(r=given.rank, target_modules=list(TARGETS), init_lora_weights=False)
    theirs: Any = get_peft_model(d.frozen_base(given.shape, 1), config)  # type: ignore[arg-type]
    steps: dict[str, Step] = {
        COPY: lambda: [weight.clone() for weight in weights],  # type: ignore[dict-item, return-value]
        ONE: lambda: merged_tensors(model, names[:1]),  # type: ignore[dict-item, return-value]
        THREE: lambda: merged_tensors(model, names),  # type: ignore[dict-item, return-value]
        PEFT: theirs.merge_adapter,
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for step in steps.values():
        milliseconds(step, 3) if step is not steps[PEFT] else _peft(theirs)
    for _ in track(range(given.rounds), "timing", console=Console(stderr=True)):
        for name in order.sample(list(steps), len(steps)):
            time = _peft(theirs) if name == PEFT else milliseconds(steps[name], 10)
            found[name].append(time)
    size = sum(weight.nbytes for weight in weights)
    told = machine() | {"shape": given.shape, "rank": given.rank, "MB": round(size / 1e6)}
    table = Table("", "ms", "/ copy", "GB/s", title=", ".join(f"{k} {v}" for k, v in told.items()))
    for name, times in found.items():
        ratios = [a / b for a, b in zip(times, found[COPY], strict=True)]
        middle, ratio = statistics.median(times), statistics.median(ratios)
        table.add_row(name, f"{middle:.3f}", f"{ratio:.2f}", f"{2 * size / middle / 1e6:.0f}")
    Console(width=100).print(table)
    print(f"M1: goal {GOAL} for one adapter")
    if given.json is not None:
        given.json.write_text(json.dumps({"settings": told, "ms": found}, indent=1))


def _peft(theirs: Any) -> float:
    """Return the milliseconds of one merge, in place; it is undone apart."""
    time = milliseconds(theirs.merge_adapter, 1)
    theirs.unmerge_adapter()
    return time


def arguments() -> argparse.Namespace:
    """Return what is given on the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=d.SHAPES, default="llama-8b")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--rounds", type=int, default=10)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the times here")
    return made.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(arguments())
