"""The kernels of one layer's training step, lora_fx beside the frozen base, by kind.

On a GPU, its kernels; on a CPU, the operators that its compiled code calls. `more` is what lora_fx
takes beyond the base: of which kinds the difference is made.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import decoders as d
from tests.benchmarks.adapted import Adapter
from tests.benchmarks.command import parser, settings
from tests.benchmarks.interleaved import DEVICE, WARM_UP, Step, machine

STEPS = 10
KINDS = {  # in this order: Inductor names its kernels after the operators that it fused
    "matrix products": r"^triton_tem_|^(?!triton_).*(nvjet|gemm|splitK|::(add)?mm$|::bmm$|mkl)",
    "Inductor's own": r"^triton_|^cpp_fused",
    "attention": r"flash|fmha|attention|sdpa",
    "copies and fills": r"mem(cpy|set)|copy|fill|::zero_",
}
OTHER = "others"
LEAST = 0.002  # kernels below this share of the step are counted, not listed


@dataclass
class Kernel:
    """Launches in a step and their microseconds."""

    launches: float = 0.0
    us: float = 0.0

    def __add__(self, other: "Kernel") -> "Kernel":
        return Kernel(self.launches + other.launches, self.us + other.us)


Kernels = dict[str, Kernel]


def main(given: argparse.Namespace) -> None:
    """Print one table for both, kinds first and their kernels below them."""
    adapter = Adapter(given.rank, given.dropout, d.ATTENTION + d.MLP)
    base = d.frozen_base(given.shape, 1)
    builds = d.training_steps(base, adapter, given.samples, given.tokens)
    floor, ours = (kernels(builds[name]()) for name in (d.FLOOR, d.OURS))
    told = settings(given, benchmark="layer kernels", layers=1) | machine()
    show(floor, ours, ", ".join(f"{key} {value}" for key, value in told.items()))
    if given.json is not None:
        found = {
            name: {key: vars(kernel) for key, kernel in of.items()}
            for name, of in ((d.FLOOR, floor), (d.OURS, ours))
        }
        known = json.loads(given.json.read_text()) if given.json.exists() else []
        entry = {"settings": told, "kernels": found}
        given.json.write_text(json.dumps([*known, entry], indent=1))


def kernels(step: Step) -> Kernels:
    """Return what a step launches, by name."""
    for _ in range(WARM_UP):
        step()
    gpu = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    totals: Kernels = defaultdict(Kernel)
    for event in recorded.events() or []:
        if gpu and event.device_type.name == "CUDA" and not event.is_user_annotation:
            totals[event.name] += Kernel(1, event.self_device_time_total)
        if not gpu and event.name.startswith(("aten::", "mkl", "cpp_fused")):
            totals[event.name] += Kernel(1, event.self_cpu_time_total)
    return {name: Kernel(of.launches / STEPS, of.us / STEPS) for name, of in totals.items()}


def kind_of(name: str) -> str:
    """Return the kind of a kernel: by what its name says."""
    return next((kind for kind, text in KINDS.items() if re.search(text, name, re.I)), OTHER)


def by_kind(of: Kernels) -> Kernels:
    """Return the sum of each kind, all kinds in their order."""
    sums = {kind: Kernel() for kind in (*KINDS, OTHER)}
    for name, kernel in of.items():
        sums[kind_of(name)] += kernel
    return sums


def show(floor: Kernels, ours: Kernels, title: str) -> None:
    table = Table("", title=title)
    for column in ("base: launches", "µs", "lora_fx: launches", "µs", "more launches", "more µs"):
        table.add_column(column, justify="right", no_wrap=True)
    kinds = by_kind(floor), by_kind(ours)
    total = [sum(of.values(), Kernel()) for of in (floor, ours)]
    add_row(table, "all", *total)
    for kind in kinds[0]:
        add_row(table, f"[bold]{kind}", kinds[0][kind], kinds[1][kind])
    for kind in kinds[0]:
        table.add_section()
        pairs = {
            name: (floor.get(name, Kernel()), ours.get(name, Kernel()))
            for name in floor | ours
            if kind_of(name) == kind
        }
        for name, pair in sorted(pairs.items(), key=lambda item: -item[1][0].us - item[1][1].us):
            if max(kernel.us for kernel in pair) >= LEAST * total[0].us:
                add_row(table, short(name), *pair)
    Console(width=160).print(table)


def add_row(table: Table, name: str, floor: Kernel, ours: Kernel) -> None:
    cells = [
        text for kernel in (floor, ours) for text in (f"{kernel.launches:.0f}", f"{kernel.us:.0f}")
    ]
    more = f"{ours.launches - floor.launches:+.0f}", f"{ours.us - floor.us:+.0f}"
    table.add_row(name, *cells, *more)


def short(name: str) -> str:
    """Return a kernel's name without template arguments, but for what PyTorch's loops compute."""
    computed = re.search(r"\w+(Functor|Ops?|_kernel_(cuda|impl))\b", name.partition("<")[2])
    plain = re.sub(r"^void |at::native::|<.*", "", name)[:80]
    return f"{plain}: {computed[0]}" if computed and "elementwise" in plain else plain


if __name__ == "__main__":
    arguments = parser(__doc__, of_times=False)
    arguments.add_argument("--json", type=Path, metavar="FILE", help="add the numbers to this file")
    main(arguments.parse_args())
