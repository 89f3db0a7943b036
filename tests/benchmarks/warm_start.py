"""Time the start of training in a new process: cold, and from an artifact (goal C2).

`start` is from a loaded base to the end of the first training step, less a later step; `process` is
all from start to exit. "by caches" has only what Inductor keeps in the artifact, "ahead" the graphs
too. Each process has an empty Inductor cache of its own. Rounds are interleaved; medians and their
ranges.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SPEC = """lora 1
adapter default { rank = 8  target linear }
compile { entry train { batch = 4  sequence = 64 } }
"""
RATIOS = (
    ("by caches / cold", "by caches", "cold", "≤ 1/6"),
    ("ahead / cold", "ahead", "cold", "≤ 1/20"),
    ("cold, 32 layers / 4 layers", "cold, 32 layers", "cold, 4 layers", "≤ 1.3"),
)


def main(rounds: int, layers: int, hidden: int) -> None:
    """Print the times and the ratios that are goals."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        jobs = {"cold": ("cold", layers), "cold, 4 layers": ("cold", 4)} | {
            "cold, 32 layers": ("cold", 32),
            "by caches": ("caches", layers),
            "ahead": ("ahead", layers),
        }
        for depth in {layers, 4, 32}:
            child(folder, "base", depth, hidden)
        for name in ("caches", "ahead"):
            child(folder, f"build-{name}", layers, hidden)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for name, (how, depth) in jobs.items():
                found[name].append(child(folder, how, depth, hidden))
    title = f"s; {layers} layers, hidden {hidden}, {os.cpu_count()} cores, {rounds} rounds"
    table = Table("", "start", "range", "process", "range", "a later step", title=title)
    for name, times in found.items():
        cells = []
        for key in ("start", "process"):
            values = [one[key] for one in times]
            span = f"{min(values):.2f}–{max(values):.2f}"
            cells += [f"{statistics.median(values):.2f}", span]
        table.add_row(name, *cells, f"{statistics.median(one['step'] for one in times):.3f}")
    Console().print(table)
    for what, over, under, goal in RATIOS:
        ratios = [
            statistics.median(one[key] for one in found[over])
            / statistics.median(one[key] for one in found[under])
            for key in ("start", "process")
        ]
        print(f"{what}: start {ratios[0]:.3f} (goal {goal}), process {ratios[1]:.3f}")


def child(folder: Path, what: str, layers: int, hidden: int) -> dict[str, float]:
    """Run one process and return its times."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "LORA_FX_CACHE": str(folder / "own"),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
        command += ["--layers", str(layers), "--hidden", str(hidden)]
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        whole = time.perf_counter() - start
    return json.loads(done.stdout.decode().splitlines()[-1]) | {"process": whole}


def run_child(what: str, folder: Path, layers: int, hidden: int) -> None:
    """Do one thing in a process of its own, and print its times as JSON."""
    base = folder / f"base-{layers}"
    if what == "base":
        save_base(base, layers, hidden)
    elif what.startswith("build-"):
        build(base, folder / what.removeprefix("build-"), ahead=what == "build-ahead")
    else:
        print(json.dumps(started(base, None if what == "cold" else folder / what)))
        return
    print("{}")


def save_base(base: Path, layers: int, hidden: int) -> None:
    """Write a random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        vocab_size=1000,
        **heads,
    )
    LlamaForCausalLM(config).save_pretrained(base)


def build(base: Path, out: Path, ahead: bool) -> None:
    """Build an artifact of the one program that is timed."""
    import lora_fx
    from lora_fx.runtime.artifact import recorder, write

    programs = write.programs
    write.programs = lambda *args: programs(*args)[:1]
    if not ahead:
        recorder.compile_ahead = lambda *_: None
    lora_fx.build(SPEC, base, out)


def started(base: Path, artifact: Path | None) -> dict[str, float]:
    """Return how long a start takes, and a step afterwards."""
    import torch
    from transformers import AutoModelForCausalLM

    import lora_fx

    loaded = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(1, 1000, (4, 64))
    start = time.perf_counter()
    model: Any = lora_fx.load(artifact, loaded) if artifact else lora_fx.compile(loaded, SPEC)
    model.train()

    def step() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        model.zero_grad()

    step()
    first = time.perf_counter() - start
    steps = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        steps.append(time.perf_counter() - start)
    later = statistics.median(steps)
    return {"start": first - later, "step": later}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_child(given.child, given.folder, given.layers, given.hidden)
    else:
        main(given.rounds, given.layers, given.hidden)
