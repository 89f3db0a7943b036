"""Time candidates in turns: each round times every candidate once, in a new order.

A candidate is a function that builds a step. Clocks and temperatures drift, so that only times of
one round are compared (`record.py`).
"""

import gc
import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch._dynamo.utils import counters

from tests.benchmarks.record import Record, Run

Step = Callable[[], None]
Build = Callable[[], Step]
WARM_UP = 3
REPEATS = 3
GIB = 2**30
SOURCES = Path(__file__).parents[2] / "lora_fx"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(builds: dict[str, Build], rounds: int, record: Record, always: tuple[str, ...]) -> None:
    """Add to the record what it lacks until each candidate has `rounds` rounds.

    If anything is lacking, the candidates in `always`, which others are compared with, take part.
    The file is written after each round: a process that was stopped can be continued.
    """
    lacking = record.lacking(builds, rounds)
    if not lacking:
        return
    torch.compiler.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not silently eager
    run = record.new()
    steps: dict[str, Step] = {}
    names = [name for name in builds if name in lacking or name in always]
    for name in _track(names, "compiling"):
        try:
            steps[name] = warm_up(builds[name], run.facts.setdefault(name, {}))
        except Exception as error:
            if name in always:
                raise
            run.failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    for step in steps.values():
        step()
    shuffle = random.Random(0).sample
    for _ in _track(range(max(lacking.values())), "timing"):
        run.rounds.append(one_round(steps, shuffle(list(steps), len(steps)), run))
        record.save()


def warm_up(build: Build, facts: dict[str, float]) -> Step:
    """Build and compile a step, and note what it takes.

    `held`: GiB between steps beyond what was there before; `step`: the most in a step beyond that;
    `graphs`: how many Dynamo captured; `first_s`: of the first step, with caches as they were.
    """
    before, graphs = allocated(), captured()
    step = build()
    facts["first_s"] = milliseconds(step, 1) / 1e3
    for _ in range(WARM_UP - 1):
        step()
    facts["graphs"] = captured() - graphs
    facts["recompiled"] = 0
    if DEVICE == "cuda":
        held = allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        facts["held"] = (held - before) / GIB
        facts["step"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return step


def one_round(steps: dict[str, Step], order: list[str], run: Run) -> dict[str, float]:
    """Return the milliseconds of each; graphs that were captured meanwhile are noted."""
    times: dict[str, float] = {}
    for name in order:
        graphs = captured()
        times[name] = milliseconds(steps[name], REPEATS)
        run.facts[name]["recompiled"] += captured() - graphs
    return times


def milliseconds(step: Step, repeats: int) -> float:
    """Return the mean time of a step."""
    _synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    _synchronise()
    return (time.perf_counter() - start) / repeats * 1e3


def machine() -> dict[str, str]:
    """Say what the times depend on beside the settings; `code` is a digest of lora_fx's sources."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*.py")):
        digest.update(file.read_bytes())
    gpu = DEVICE == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "code": digest.hexdigest()[:8],
    }


def allocated() -> int:
    """Return the bytes of live tensors on the GPU; 0 without one."""
    _synchronise()
    gc.collect()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def captured() -> int:
    return counters["stats"]["unique_graphs"]


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _track(items, what: str):
    return track(list(items), what, console=Console(stderr=True))
