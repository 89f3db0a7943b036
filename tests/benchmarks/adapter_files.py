"""Time saving and loading a Llama-3-8B's adapter, rank 16 on all linears, beside its bare bytes.

Bare are safetensors' `save_file` of the same tensors, synced to the disk as `save_pretrained` does
it, and `load_file` with a copy of each tensor into fresh memory: a mapped file is not read yet, and
what was read lasts no longer than the file. What is loaded is kept, so that no memory is used
twice, and garbage is collected before each. The base takes no memory. Rounds are interleaved;
medians, fastest and slowest.

    python -m tests.benchmarks.adapter_files
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

import lora_fx
from tests.benchmarks.hollow import hollow_llama, spec

FILE = "adapter_model.safetensors"
RATIOS = (("save_pretrained", "bare save_file"), ("load_adapter", "bare load_file"))


class Candidates:
    """What is timed, each on files and names of its own."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._place = folder
        self._count = 0
        self._kept: list[Any] = []
        self.model: Any = lora_fx.compile(hollow_llama(), spec(dtype, "random"))
        self.model.save_pretrained(folder / "given")
        self.file = folder / "given" / FILE
        self.tensors = {name: tensor.clone() for name, tensor in load_file(self.file).items()}
        self.peft: Any = PeftModel.from_pretrained(hollow_llama(), folder / "given")

    def all(self) -> dict[str, Callable[[], object]]:
        return {
            "bare save_file": self.bare_save,
            "save_pretrained": lambda: self.model.save_pretrained(self._next()),
            "save_pretrained over another": lambda: self.model.save_pretrained(self.file.parent),
            "PEFT's save_pretrained": lambda: self.peft.save_pretrained(self._next()),
            "bare load_file": self.bare_load,
            "load_adapter": lambda: self.model.load_adapter(self.file.parent, self._next().name),
            "load_adapter over another": lambda: self.model.load_adapter(self.file.parent),
            "PEFT's load_adapter": lambda: self.peft.load_adapter(
                self.file.parent, self._next().name
            ),
        }

    def forget(self) -> None:
        """Give back what a round has loaded and written."""
        self._kept.clear()
        for model in (self.model, self.peft):
            for name in set(model.peft_config) - {"default"}:
                model.delete_adapter(name)
        for path in self._place.glob("a*"):
            shutil.rmtree(path)

    def bare_save(self) -> None:
        folder = self._next()
        folder.mkdir()
        save_file(self.tensors, folder / FILE, {"format": "pt"})
        for path in (folder / FILE, folder):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)

    def bare_load(self) -> None:
        self._kept.append({name: tensor.clone() for name, tensor in load_file(self.file).items()})

    def _next(self) -> Path:
        self._count += 1
        return self._place / f"a{self._count}"


def main(rounds: int, dtype: str, out: Path | None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        candidates = Candidates(Path(folder), dtype)
        found: dict[str, list[float]] = {name: [] for name in candidates.all()}
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for name, run in candidates.all().items():
                found[name].append(seconds(run))
            candidates.forget()
        size = candidates.file.stat().st_size / 1e6
    title = f"s; {size:.0f} MB in {dtype}, {rounds} rounds"
    table = Table("", "median", "min", "max", title=title)
    middle = {name: statistics.median(times) for name, times in found.items()}
    for name, times in found.items():
        table.add_row(name, f"{middle[name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}")
    Console().print(table)
    for ours, bare in RATIOS:
        beyond = middle[ours] - middle[bare]
        print(f"{ours} / {bare}: {middle[ours] / middle[bare]:.2f}, {beyond * 1e3:.0f} ms beyond")
    if out:
        out.write_text(json.dumps({"megabytes": size, "seconds": found}, indent=2))


def seconds(run: Callable[[], object]) -> float:
    gc.collect()
    os.sync()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, dest="out", help="also write every number there")
    main(**vars(parser.parse_args()))
