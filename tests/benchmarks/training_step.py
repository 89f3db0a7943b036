"""Goals T1 to T4: a training step beside the frozen base and PEFT.

Forward and backward of Llama-shaped layers in bf16, with gradients to the embeddings, interleaved.
T1 is lora_fx over the frozen base, T2 what PEFT takes over what lora_fx takes, T3 dropout over
none (with `--dropout`), T4 the memory beyond the base. The goals hold for the default shapes on a
GPU; on a CPU (`--shape tiny --layers 2 --tokens 64`) the command shows that it works.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import decoders as d
from tests.benchmarks.adapted import Adapter
from tests.benchmarks.interleaved import DEVICE, machine, measure
from tests.benchmarks.record import Record
from tests.benchmarks.table import Goal, show, show_goals

ALWAYS = (d.FLOOR, d.OURS)
PEFT_GOALS = {d.PEFT_LAYERS: 1.09, d.PEFT_LAYERS_FP32: 1.33, d.PEFT_WHOLE: 1.42}
PEFT_GOALS |= {d.PEFT_EAGER: None, d.PEFT_EAGER_FP32: 2.0}
GOAL_SETTINGS = {
    "shape": "llama-8b",
    "layers": 8,
    "tokens": "2×4096",
    "rank": 16,
    "linears": "all",
    "dtype": "bf16",
}


def main(arguments: argparse.Namespace) -> None:
    """Measure what the file lacks, and print all that it has at these settings."""
    given = arguments
    settings = {
        "shape": given.shape,
        "layers": given.layers,
        "tokens": f"{given.samples}×{given.tokens}",
        "rank": given.rank,
        "dropout": given.dropout,
        "linears": "attention" if given.attention else "all",
        "dtype": "bf16",
    }
    record = Record(given.json, {"benchmark": "training step"} | settings, machine())
    adapter = Adapter(given.rank, given.dropout, d.ATTENTION + (() if given.attention else d.MLP))
    base = d.frozen_base(given.shape, given.layers)
    builds = d.training_steps(base, adapter, given.samples, given.tokens)
    names = chosen(list(builds), given.only)
    measure({name: builds[name] for name in names}, given.rounds, record, ALWAYS)
    show(record, d.FLOOR)
    stated = DEVICE == "cuda" and GOAL_SETTINGS.items() <= settings.items()
    show_goals(goals(record, stated))


def chosen(names: list[str], words: list[str]) -> list[str]:
    """Return the candidates with one of the words in their names, and those that always run."""
    unknown = [word for word in words if not any(word in name for name in names)]
    if unknown:
        known = "\n  ".join(names)
        raise SystemExit(
            f"--only: no candidate has {unknown[0]!r} in its name; there are\n  {known}"
        )
    return [n for n in names if not words or n in ALWAYS or any(word in n for word in words)]


def goals(record: Record, stated: bool) -> list[Goal]:
    """Return the goals' ratios; without `stated` the settings are not those of the bounds."""
    floors = [name for name in (d.FLOOR, d.FLOOR_WHOLE) if record.ratio(name, d.FLOOR)]
    floor = min(floors, key=lambda name: record.ratio(name, d.FLOOR) or 0)
    found = [Goal("T1", f"{d.OURS} / {floor}", record.ratio(d.OURS, floor), 1.06)]
    found += [
        Goal("T2", f"{name} / {d.OURS}", record.ratio(name, d.OURS), bound, least=True)
        for name, bound in PEFT_GOALS.items()
    ]
    found += [
        Goal("T3", f"dropout / {d.OURS_DRY}", record.ratio(d.OURS, d.OURS_DRY), 1.04),
        Goal("T4", f"memory / {d.PEFT_LAYERS}", memory(record, d.OURS, d.PEFT_LAYERS), 1.0),
        Goal("", f"{d.OURS_WHOLE} / {d.OURS}", record.ratio(d.OURS_WHOLE, d.OURS), 1.0),
    ]
    if not stated:
        for goal in found:
            goal.bound = None
    return found


def memory(record: Record, over: str, under: str) -> float | None:
    """Return the ratio of what two hold at most beyond the base, adapters and a step together."""
    totals = []
    for name in (over, under):
        held, step = record.fact(name, "held"), record.fact(name, "step")
        if held is None or step is None:
            return None
        totals.append(held + step)
    return totals[0] / totals[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=d.SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--attention", action="store_true", help="adapt attention projections only")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help="candidates with a word in their names, beside the floor and lora_fx",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE",
        help="keep the numbers here; what the file has of this device and code is not done again",
    )  # fmt: skip
    main(parser.parse_args())
