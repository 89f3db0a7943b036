"""Measure the peak memory of ways to get a base and to adapt it, each in a process of its own.

Peak resident memory, what was touched of mapped files included, above that of a process which only
imports. Linux only.
"""

import argparse
import copy
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_fx import compile, load  # here, so that their imports are not measured

ROOT = Path(__file__).parents[2]
SPEC = "lora 1 adapter default { rank = 8 target linear }"
MIB = 2**20


def read(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def mapped(folder: Path) -> nn.Module:
    with init_empty_weights():
        model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model


def on_disk(folder: Path) -> nn.Module:
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"lm_head": "cpu"} | {f"model.layers.{i}": "disk" for i in range(layers)}
    with tempfile.TemporaryDirectory() as offload:
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map=places, offload_folder=offload
        )


def compiled(base: nn.Module, folder: Path) -> nn.Module:
    return compile(base, SPEC, backend=None)


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    return load(folder / "adapter", base, backend=None)


def copied(base: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(base)


@torch.no_grad()
def run(model: nn.Module) -> None:
    model(input_ids=torch.arange(16).view(1, -1))


BASES = {"read": read, "mapped from its file": mapped, "offloaded to disk": on_disk}
STEPS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "nothing": lambda base, _: base,
    "lora_fx.compile": compiled,
    "lora_fx.load": loaded,
    "copy.deepcopy": copied,
}


def measure(base: str, step: str, folder: Path) -> None:
    """Do one job and print this process's peaks in bytes: imported, adapted, run."""
    print(peak())
    given = BASES[base](folder)
    model = STEPS[step](given, folder)
    print(peak())
    run(model)
    print(peak())


def peak() -> int:
    """Return the most memory that this process has had (`ru_maxrss` counts its parent too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def peaks_of(*job: str) -> tuple[int, int]:
    """Return the peaks of a job before and after a forward, above what importing takes."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--job", *job],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT)},
    )
    imported, adapted, ran = map(int, done.stdout.split()[-3:])
    return adapted - imported, ran - imported


def main(layers: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_model(folder, layers)
        cases = [(base, step) for base in BASES for step in STEPS]
        progress = track(cases, "measuring", console=Console(stderr=True))
        peaks = {case: peaks_of(*case, name) for case in progress}
    title = f"peak memory over the {base / MIB:.0f} MiB of the base"
    table = Table("base", "adapted by", "before a forward", "after one", title=title)
    for (name, step), (adapted, ran) in peaks.items():
        table.add_row(name, step, f"{adapted / base:.2f}", f"{ran / base:.2f}")
    Console().print(table)


def write_model(folder: Path, layers: int) -> int:
    """Write a random Llama and an adapter for it, and return the bytes of its weights."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        vocab_size=4000,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    compile(model, SPEC, backend=None).save_pretrained(folder / "adapter")
    return sum(parameter.nbytes for parameter in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        base, step, folder = arguments.job
        measure(base, step, Path(folder))
    else:
        main(arguments.layers)
