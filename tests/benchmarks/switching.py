"""Time what a host does to switch, turn off and merge adapters, beside PEFT.

A Llama of 32 layers so narrow that its arithmetic takes no time: 224 sites with two adapters. With
real widths the device's work for a merge comes on top (`merge_bandwidth.py`), and none for the
others. Rounds are interleaved; medians, fastest and slowest.

    python -m tests.benchmarks.switching
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

SITES = 224
OURS, THEIRS = "lora_fx", "PEFT"


def main(rounds: int, out: Path | None) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    steps = {OURS: steps_of(ours()), THEIRS: steps_of(theirs())}
    candidates = [(name, what) for name, own in steps.items() for what in own]
    found: dict[tuple[str, str], list[float]] = {one: [] for one in candidates}
    for name, what in candidates:
        steps[name][what]()
    order = random.Random(0)
    for _ in track(range(rounds), "timing", console=Console(stderr=True)):
        for name, what in order.sample(candidates, len(candidates)):
            found[name, what].append(milliseconds(steps[name][what]))
    title = f"ms; {SITES} sites, 2 adapters of rank 4, one thread, {rounds} rounds"
    table = Table("", OURS, "", THEIRS, "", f"{THEIRS} / {OURS}", title=title)
    for what in steps[OURS]:
        own, other = found[OURS, what], found[THEIRS, what]
        ratio = statistics.median(b / a for a, b in zip(own, other, strict=True))
        table.add_row(what, *told(own), *told(other), f"{ratio:.2f}")
    Console(width=100).print(table)
    if out:
        out.write_text(json.dumps({f"{a}: {b}": times for (a, b), times in found.items()}))


def told(times: list[float]) -> tuple[str, str]:
    return f"{statistics.median(times):.1f}", f"{min(times):.1f}–{max(times):.1f}"


def base() -> LlamaForCausalLM:
    """Return the narrow Llama."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).bfloat16()


def ours() -> Any:
    spec = "lora 1" + "".join(
        f"\nadapter {name} {{ rank = 4 init = random target linear }}" for name in ("a", "b")
    )
    model = lora_fx.compile(base(), spec, backend=None)
    assert len(model.lora_fx_plan.sites) == 2 * SITES
    return model


def theirs() -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name="a")  # type: ignore[arg-type]
    model.add_adapter("b", config)
    return model


def steps_of(model: Any) -> dict[str, Callable[[], None]]:
    """Return what is timed, which leaves a model as it was but for what is active."""
    names = cycle("ba")

    def off_and_on() -> None:
        with model.disable_adapter():
            pass

    def merge_and_unmerge() -> None:
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()

    return {
        "set_adapter": lambda: model.set_adapter(next(names)),
        "disable_adapter, off and on": off_and_on,
        "merge_adapter and unmerge_adapter": merge_and_unmerge,
    }


def milliseconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, dest="out", help="also write every number there")
    main(**vars(parser.parse_args()))
