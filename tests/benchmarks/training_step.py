"""Goals T1 to T4: a training step beside the frozen base and PEFT.

Forward and backward of Llama-shaped layers in bf16, with gradients to the embeddings, interleaved.
T1 is lora_fx over the frozen base, T2 what PEFT takes over what lora_fx takes, T3 dropout over
none (with `--dropout`), or DoRA over LoRA (with `--variant dora`, of lora_fx and of PEFT), T4 the
memory beyond the base. The goals hold for the default shapes on a GPU; on a CPU (`--shape tiny
--layers 2 --tokens 64`) the command shows that it works.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import decoders as d
from tests.benchmarks.adapted import Adapter
from tests.benchmarks.command import chosen, parser, settings
from tests.benchmarks.interleaved import DEVICE, machine, measure
from tests.benchmarks.record import Record
from tests.benchmarks.table import Goal, show, show_goals

ALWAYS = (d.FLOOR, d.OURS, d.OURS_AUGMENTED)
PEFT_GOALS = {
    d.PEFT_LAYERS: 1.09,
    d.PEFT_LAYERS_FP32: 1.33,
    d.PEFT_WHOLE: 1.42,
    d.PEFT_EAGER: None,
    d.PEFT_EAGER_FP32: 2.0,
}
STATED = {"shape": "llama-8b", "layers": 8, "tokens": "2×4096", "rank": 16, "linears": "all"}


def main(given: argparse.Namespace) -> None:
    """Measure what the file lacks, and print all that it has at these settings."""
    linears = "attention" if given.attention else "all"
    told = settings(given, benchmark="training step", layers=given.layers, linears=linears)
    told["variant"] = given.variant
    targets = d.ATTENTION + (() if given.attention else d.MLP)
    adapter = Adapter(given.rank, given.dropout, targets, given.variant)
    base = d.frozen_base(given.shape, given.layers)
    builds = d.training_steps(base, adapter, given.samples, given.tokens)
    names = chosen(list(builds), given.only, ALWAYS)
    record = Record(given.json, told, machine())
    measure({name: builds[name] for name in names}, given.rounds, record, ALWAYS)
    show(record, d.FLOOR)
    of_variant = goals if given.variant == "lora" else goals_of_dora
    show_goals(of_variant(record), stated=DEVICE == "cuda" and STATED.items() <= told.items())


def goals(record: Record) -> list[Goal]:
    """Return the goals of `architecture.md`; T1 is over the fastest floor that took part."""
    floors = [name for name in (d.FLOOR, d.FLOOR_WHOLE) if record.ratio(name, d.FLOOR)]
    peft = d.PEFT_LAYERS
    floor = min(floors, key=lambda name: record.ratio(name, d.FLOOR) or 0)
    t2 = [
        Goal("T2", f"{name} / {d.OURS}", record.ratio(name, d.OURS), bound, least=True)
        for name, bound in PEFT_GOALS.items()
    ]
    return [
        *(
            Goal("T1", f"{name} / {floor}", record.ratio(name, floor), 1.06)
            for name in (d.OURS, d.OURS_AUGMENTED)
        ),
        *t2,
        Goal("T3", f"dropout / {d.OURS_DRY}", record.ratio(d.OURS, d.OURS_DRY), 1.04),
        *(
            Goal("T4", f"memory: {name} / {peft}", memory(record, name, peft), 1.0)
            for name in (d.OURS, d.OURS_AUGMENTED)
        ),
        Goal("", f"{d.OURS_WHOLE} / {d.OURS}", record.ratio(d.OURS_WHOLE, d.OURS), 1.0),
    ]


def goals_of_dora(record: Record) -> list[Goal]:
    """Return the goal for DoRA in either layout, and what PEFT's DoRA takes over lora_fx's."""
    pairs = ((d.OURS, d.OURS_LORA), (d.OURS_AUGMENTED, d.OURS_LORA_AUGMENTED))
    return [
        *(Goal("T3", f"DoRA / {lora}", record.ratio(dora, lora), 1.06) for dora, lora in pairs),
        *(
            Goal("", f"{name} / {d.OURS}", record.ratio(name, d.OURS), None, least=True)
            for name in PEFT_GOALS
        ),
    ]


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
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--attention", action="store_true", help="no adapters on the MLP")
    arguments.add_argument("--variant", choices=["lora", "dora"], default="lora")
    main(arguments.parse_args())
