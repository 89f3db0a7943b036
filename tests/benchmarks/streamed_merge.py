"""Time `lora-fx merge` beside a copy of the same files (M1), and measure its peak memory.

Random Llama-shaped layers in bf16, in shards, and one float32 adapter on all linears. Both read
what the disk, or the system's cache of it, gives, and write until it is on the disk. The peak is
of a process that merges, beyond one that only imports what it needs; Linux only.

    python -m tests.benchmarks.streamed_merge [--shape llama-8b] [--layers 4] [--rank 16]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaForCausalLM

import lora_fx
from tests.benchmarks import decoders as d
from tests.benchmarks.interleaved import GIB, machine
from tests.benchmarks.peak_memory import peak

COPY, MERGE = "copy", "lora_fx.merge"
SPEC = """lora 1
model "{base}"
adapter a {{ weights = "{adapter}" }}
merge whole {{ from a  into = base  save = "{out}" }}
"""


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        shards = write_model(folder, given)
        size = sum(shard.stat().st_size for shard in shards)
        largest = max(shard.stat().st_size for shard in shards)
        seconds: dict[str, list[float]] = {COPY: [], MERGE: []}
        peaks = []
        for _ in track(range(given.rounds), "timing", console=Console(stderr=True)):
            seconds[COPY].append(copied(shards, folder / "copy"))
            taken, held = merged(folder)
            seconds[MERGE].append(taken)
            peaks.append(held)
    told = machine() | {"shape": given.shape, "layers": given.layers, "rank": given.rank}
    title = ", ".join(f"{k} {v}" for k, v in told.items())
    table = Table("", "s", "/ copy", "GB/s", title=f"{title}, {len(shards)} shards")
    for what, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[COPY], strict=True)]
        middle = statistics.median(times)
        speed = f"{size / middle / 1e9:.2f}"
        table.add_row(what, f"{middle:.2f}", f"{statistics.median(ratios):.2f}", speed)
    Console(width=100).print(table)
    print(
        f"M1: peak {max(peaks) / GIB:.2f} GiB, of {size / GIB:.2f} GiB in all; goal: one shard "
        f"and 1 GB, {(largest + 1e9) / GIB:.2f} GiB"
    )


def write_model(folder: Path, given: argparse.Namespace) -> list[Path]:
    """Write a model in shards, an adapter for it and a spec; return the shards."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(d.config_of(given.shape, given.layers)).bfloat16()
    base.save_pretrained(folder / "base", max_shard_size=given.shard)
    spec = f"lora 1 adapter a {{ rank = {given.rank} init = random target linear }}"
    adapted = lora_fx.compile(base, spec, backend=None, inplace=True)
    adapted.save_pretrained(folder / "adapter")
    paths = dict(base=folder / "base", adapter=folder / "adapter" / "a", out=folder / "out")
    (folder / "a.lora").write_text(SPEC.format(**paths))
    return sorted((folder / "base").glob("*.safetensors"))


def copied(shards: list[Path], into: Path) -> float:
    """Copy the shards, until they are on the disk; return the seconds."""
    into.mkdir()
    os.sync()
    begin = time.perf_counter()
    for shard in shards:
        with shard.open("rb") as source, (into / shard.name).open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 24)
            file.flush()
            os.fsync(file.fileno())
    taken = time.perf_counter() - begin
    shutil.rmtree(into)
    return taken


def merged(folder: Path) -> tuple[float, int]:
    """Merge in a process of its own; return the seconds of it, and the bytes of its peak."""
    done = subprocess.run(
        [sys.executable, __file__, "--job", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shutil.rmtree(folder / "out")
    taken, held = done.stdout.split()[-2:]
    return float(taken), int(held)


def job(folder: Path) -> None:
    """Merge, and print the seconds and the bytes of this process's peak beyond its imports."""
    import lora_fx.compiler

    os.sync()
    before, begin = peak(), time.perf_counter()
    lora_fx.merge(folder / "a.lora")
    print(time.perf_counter() - begin, peak() - before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=d.SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write, the system's default if not")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is None:
        main(arguments)
    else:
        job(arguments.job)
