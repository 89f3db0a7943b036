"""Time the start of training in a new process: cold, and from an artifact (goal C2).

`imports` is what importing torch's compiler takes, which no artifact can save; `start` is then
from a loaded base to the end of the first training step, less a later step; "three entries":
to the end of a training step, an evaluation and a short generation. `process` is all from start to
exit. "by caches" has only what Inductor keeps in the artifact, "ahead" the graphs too. Each process
has an empty Inductor cache of its own. Rounds are interleaved; medians and their ranges.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TRAIN = "entry train { batch = 4  sequence = 64 }"
THREE = " ".join(TRAIN.replace("train", name) for name in ("train", "forward", "generate"))
RATIOS = (
    ("by caches / cold", "by caches", "cold", "≤ 1/6"),
    ("ahead / cold", "ahead", "cold", "≤ 1/20"),
    ("three entries, ahead / cold", "ahead, three entries", "cold, three entries", "≤ 1/20"),
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
            "cold, three entries": ("cold-three", layers),
            "ahead, three entries": ("three", layers),
        }
        for depth in {layers, 4, 32}:
            child(folder, "base", depth, hidden)
        for name in ("caches", "ahead", "three"):
            child(folder, f"build-{name}", layers, hidden)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for name, (how, depth) in jobs.items():
                found[name].append(child(folder, how, depth, hidden))
    title = f"s; {layers} layers, hidden {hidden}, {os.cpu_count()} cores, {rounds} rounds"
    table = Table("", "imports", "start", "range", "process", "a later step", title=title)
    middle = {
        name: {key: statistics.median(one[key] for one in times) for key in times[0]}
        for name, times in found.items()
    }
    for name, times in found.items():
        starts = [one["start"] for one in times]
        cells = [f"{middle[name][key]:.2f}" for key in ("imports", "start", "process")]
        cells.insert(2, f"{min(starts):.2f}–{max(starts):.2f}")
        table.add_row(name, *cells, f"{middle[name]['step']:.3f}")
    Console().print(table)
    for what, over, under, goal in RATIOS:
        start = middle[over]["start"] / middle[under]["start"]
        both = sum(middle[over][key] for key in ("imports", "start"))
        both /= sum(middle[under][key] for key in ("imports", "start"))
        print(f"{what}: start {start:.3f} (goal {goal}), with imports {both:.3f}")


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
        build(base, folder, what.removeprefix("build-"))
    else:
        artifact = None if what.startswith("cold") else folder / what
        print(json.dumps(started(base, artifact, three=what.endswith("three"))))
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


def build(base: Path, folder: Path, name: str) -> None:
    """Build an artifact: of one training step alone, or of all that three entries stand for."""
    import lora_fx
    from lora_fx.runtime.artifact import recorder, write

    programs = write.programs
    if name != "three":
        write.programs = lambda *args: programs(*args)[:1]
    if name == "caches":
        recorder.compile_ahead = lambda *_: None
    lora_fx.build(spec(three=name == "three"), base, folder / name)


def spec(three: bool) -> str:
    """Return a spec with one entry or with three."""
    entries = THREE if three else TRAIN
    return f"lora 1\nadapter default {{ rank = 8  target linear }}\ncompile {{ {entries} }}\n"


def started(base: Path, artifact: Path | None, three: bool) -> dict[str, float]:
    """Return how long a start takes, and a step afterwards."""
    import torch
    from transformers import AutoModelForCausalLM

    import lora_fx

    start = time.perf_counter()
    import_module("torch._inductor.compile_fx")
    import_module("torch._inductor.select_algorithm")
    imports = time.perf_counter() - start
    loaded = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.randint(1, 1000, (4, 64))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = time.perf_counter()
    model: Any = (
        lora_fx.load(artifact, loaded) if artifact else lora_fx.compile(loaded, spec(three))
    )

    def step() -> None:
        model.train()
        model(**inputs, labels=ids).loss.backward()
        model.zero_grad()
        if three:
            model.eval()
            with torch.no_grad():
                model(**inputs, labels=ids)
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    step()
    first = time.perf_counter() - start
    steps = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        steps.append(time.perf_counter() - start)
    later = statistics.median(steps)
    return {"imports": imports, "start": first - later, "step": later}


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
