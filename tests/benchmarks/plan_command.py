"""Time `lora-fx plan` of a Llama-3-70B config from process start to exit, and its memory.

Beside importing transformers alone. Runs are interleaved; median, fastest and slowest, and the
largest resident set of the process.
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

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).parent.parent.parent
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SPEC = """lora 1
model "config.json"
adapter style {
  rank = 16
  alpha = 2 * rank
  target linear
  target linear except down_proj, "model.layers.0.**" where layer.index < layer.count / 2 {
    rank = 8
  }
  target regex ".*\\\\.(up|gate)_proj" { alpha = round(sqrt(rank) * 4) }
}
adapter sql { rank = 4  target "model.layers.*.self_attn.{q,k,v,o}_proj" }
"""
PLAN = [sys.executable, "-c", "from lora_fx.cli import main; main()", "plan", "spec.lora"]
CANDIDATES = {
    "import transformers' Llama": [
        *(sys.executable, "-c", "from transformers import LlamaForCausalLM")
    ],
    "lora-fx plan": PLAN,
    "lora-fx plan --json": [*PLAN, "--json"],
    "lora-fx plan --batch 1 --sequence 4096": [*PLAN, "--batch", "1", "--sequence", "4096"],
}


def main(rounds: int) -> None:
    """Print the table."""
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in CANDIDATES}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        Path(folder, "spec.lora").write_text(SPEC)
        for _ in track(range(rounds), "planning", console=Console(stderr=True)):
            for name, command in CANDIDATES.items():
                runs[name].append(measured(command, folder))
    title = f"Llama-3-70B, whole processes, {rounds} runs"
    table = Table("", "median s", "min", "max", "MB at most", title=title)
    for name, pairs in runs.items():
        seconds, sizes = zip(*pairs, strict=True)
        times = (f"{f(seconds):.2f}" for f in (statistics.median, min, max))
        table.add_row(name, *times, f"{max(sizes):.0f}")
    Console().print(table)


def measured(command: list[str], folder: str) -> tuple[float, float]:
    """Seconds from start to exit, and the peak resident set in MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(said.decode())
    return time.perf_counter() - start, usage.ru_maxrss / 1000


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    main(**vars(parser.parse_args()))
