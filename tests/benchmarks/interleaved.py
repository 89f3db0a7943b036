"""Time candidates in turns: each round times every candidate once, in a new order.

A candidate is a function that builds a step. Clocks and temperatures drift, so that only times of
one round are compared (`record.py`).
"""

import gc
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch._dynamo.utils import counters

from tests.benchmarks.record import Record

T = TypeVar("T")
Step = Callable[[], None]
Build = Callable[[], Step]
WARM_UP = 3
LEAST_REPEATS = 3
LEAST_MS = 100  # in a row, so that starting and waiting weigh little
GIB = 2**30
SOURCES = Path(__file__).parents[2] / "lora_fx"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure(builds: dict[str, Build], rounds: int, record: Record, always: tuple[str, ...]) -> None:
    """Add to the record what it lacks until each candidate has `rounds` rounds.

    If anything is lacking, the candidates in `always`, which others are compared with, take part.
    The file is written after each round: a process that was stopped can be continued.
    """
    lacking = record.lacking(builds, rounds)
    wanted = {n: build for n, build in builds.items() if n in lacking or n in always}
    if lacking:
        # more graphs than one model needs, and an error beyond them: not silently eager
        limits = {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(limits):
            _measure(wanted, max(lacking.values()), record, always)


def _measure(
    builds: dict[str, Build], rounds: int, record: Record, always: tuple[str, ...]
) -> None:
    run = record.new()
    timed: dict[str, Timed] = {}
    for name, build in _track(builds.items(), "compiling"):
        facts: dict[str, float] = {}
        try:
            timed[name] = warm_up(build, facts)
            run.facts[name] = facts
        except Exception as error:
            if name in always:
                raise
            run.failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    one_round(timed, list(timed), run.facts)  # lets the candidates meet before they are timed
    order = random.Random(0)
    for _ in _track(range(rounds), "timing"):
        run.rounds.append(one_round(timed, order.sample(list(timed), len(timed)), run.facts))
        record.save()


class Timed(NamedTuple):
    """A step, and how many of it are timed together."""

    step: Step
    repeats: int


def warm_up(build: Build, facts: dict[str, float]) -> Timed:
    """Build and compile a step, and note what it takes.

    `held`: GiB between steps beyond what was there before; `step`: the most in a step beyond that;
    `graphs`: how many Dynamo captured; `first_s`: of the first step, with caches as they were.
    """
    before, graphs = allocated(), captured()
    step = build()
    facts["first_s"] = milliseconds(step, 1) / 1e3
    later = milliseconds(step, WARM_UP)
    facts["graphs"] = captured() - graphs
    facts["recompiled"] = 0
    if DEVICE == "cuda":
        held = allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        facts["held"] = (held - before) / GIB
        facts["step"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return Timed(step, max(LEAST_REPEATS, math.ceil(LEAST_MS / later)))


def one_round(
    timed: dict[str, Timed], order: list[str], facts: dict[str, dict[str, float]]
) -> dict[str, float]:
    """Return the milliseconds of each; graphs that were captured meanwhile are noted."""
    times: dict[str, float] = {}
    for name in order:
        graphs = captured()
        milliseconds(timed[name].step, WARM_UP)  # what the candidate before left is not its own
        times[name] = milliseconds(*timed[name])
        facts[name]["recompiled"] += captured() - graphs
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


def _track(items: Iterable[T], what: str) -> Iterable[T]:
    return track(list(items), what, console=Console(stderr=True))
