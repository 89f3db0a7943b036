"""Adapters in folders that PEFT wrote, among which tokens are routed, and PEFT doing so."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, get_peft_model
from peft.tuners.lora import create_arrow_model
from torch import nn

import lora_fx
from tests.tiny import llama

TASKS, GENERAL = ("sql", "style", "law"), ("english", "french")
TARGETS = ["q_proj", "o_proj", "down_proj"]
TOP, TEMPERATURE = 2, 0.5
_IGNORED = (
    "`is_gradient_checkpointing` is deprecated|`lora_bias=True` was passed|"
    "Adapter 'default': 6 LoRA tensor"  # of a bias on B it thinks that it is a broken matrix
)


def write(folder: Path, name: str, seed: int, rank: int = 3, **settings: Any) -> Path:
    """Write an adapter whose B A has one direction that is far ahead of the others.

    PEFT finds it by fifteen steps of a power iteration, which needs that.
    """
    config = LoraConfig(r=rank, lora_alpha=4 + seed % 5, **{"target_modules": TARGETS, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _IGNORED)
        model = get_peft_model(llama(2), config)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "lora_" in key:
                tensor.copy_(torch.randn(tensor.shape, generator=made) / 3)
            if "lora_A" in key:
                tensor[1:] /= 6
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _IGNORED)
        model.save_pretrained(folder / name, save_embedding_layers=False)
    return folder / name


def write_all(folder: Path) -> Path:
    for seed, name in enumerate((*TASKS, *GENERAL)):
        write(folder, name, seed)
    return folder


def spec(
    folder: Path, general: bool = False, top: int = TOP, temperature: float = TEMPERATURE,
    more: str = "", tasks: tuple[str, ...] = TASKS,
) -> str:  # fmt: skip
    names = (*tasks, *GENERAL) if general else tasks
    adapters = [f'adapter {name} {{ weights = "{folder / name}" }}' for name in names]
    of_general = ', general = ["english", "french"]' if general else ""
    by = f"arrow(top = {top}, temperature = {temperature}{of_general})"
    return "\n".join(["lora 1", *adapters, f"route {{ by = {by} }}", more])


def by_peft(folder: Path, general: bool = False, top: int = TOP) -> nn.Module:
    config = ArrowConfig(top_k=top, router_temperature=TEMPERATURE, use_gks=general, rng_seed=7)
    tasks, others = ([str(folder / name) for name in names] for names in (TASKS, GENERAL))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _IGNORED)
        return create_arrow_model(llama(2), tasks, config, others if general else None)


def routed(folder: Path, backend: Any = None, general: bool = False, **how: Any) -> Any:
    return lora_fx.compile(llama(2), spec(folder, general, **how), backend=backend).eval()
