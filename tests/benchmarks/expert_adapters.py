"""Adapters on the stacked experts of one Mixtral-shaped layer, forward and backward, beside PEFT.

Rows go to two of the eight experts. Everything but the adapters is frozen, and the gradient goes on
to the block's input. PEFT makes W + s B A of the whole stack in every step.

    python -m tests.benchmarks.expert_adapters [--shape mixtral] [--json FILE]
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import lora_fx
from tests.benchmarks.adapted import trainable, trained, training_step, twin
from tests.benchmarks.command import add_times, chosen
from tests.benchmarks.interleaved import DEVICE, Build, Step, machine, measure
from tests.benchmarks.record import Record
from tests.benchmarks.table import Goal, show, show_goals

FLOOR = "frozen base, compiled"
OURS = "lora_fx"
MARKED = "lora_fx, backend = None"
PEFT_FP32 = "PEFT as shipped (fp32 adapters), eager"
PEFT_SAME = "PEFT, adapters as the base, eager"
ALWAYS = (FLOOR, OURS)
GOAL = 1.5
SHAPES = {"mixtral": (4096, 14336, 8), "small": (512, 1792, 8), "tiny": (32, 48, 4)}
STACKS = ("gate_up_proj", "down_proj")


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    base, builds = training_steps(given)
    told = {
        "benchmark": "experts",
        "shape": given.shape,
        "rows": given.rows,
        "rank": given.rank,
        "experts": given.experts,
        "dtype": str(base.gate.weight.dtype).removeprefix("torch."),
    }
    names = chosen(list(builds), given.only, ALWAYS)
    record = Record(given.json, told, machine())
    measure({name: builds[name] for name in names}, given.rounds, record, ALWAYS)
    show(record, FLOOR)
    goals = [
        Goal("", f"{name} / {OURS}", record.ratio(name, OURS), GOAL, least=True)
        for name in (PEFT_FP32, PEFT_SAME)
    ]
    goals.append(Goal("", f"{PEFT_FP32} / {MARKED}", record.ratio(PEFT_FP32, MARKED), least=True))
    show_goals(goals, given.shape == "mixtral" and DEVICE == "cuda")


def training_steps(
    given: argparse.Namespace,
) -> tuple[MixtralSparseMoeBlock, dict[str, Build]]:
    """Return the base, and how to build each candidate's step on its weights."""
    hidden, inner, experts = SHAPES[given.shape]
    dtype = getattr(torch, given.dtype)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = given.experts
    torch.manual_seed(0)
    with torch.device(DEVICE):
        base = MixtralSparseMoeBlock(config).to(dtype).requires_grad_(False).train()
        for parameter in base.parameters():
            parameter.normal_(std=hidden**-0.5)
        x = torch.randn(1, given.rows, hidden, dtype=dtype, requires_grad=True)
        gradient = torch.randn(1, given.rows, hidden, dtype=dtype)

    def built(build: Callable[[], Any]) -> Step:
        model = build()
        return training_step(lambda: [model(x)], [gradient], [x, *trainable(model)])

    models: dict[str, Callable[[], Any]] = {
        FLOOR: lambda: torch.compile(twin(base)),
        OURS: lambda: by_lora_fx(base, given.rank, "inductor"),
        MARKED: lambda: by_lora_fx(base, given.rank, None),
        PEFT_FP32: lambda: by_peft(base, given.rank, x, upcast=True),
        PEFT_SAME: lambda: by_peft(base, given.rank, x, upcast=False),
    }
    return base, {name: lambda build=build: built(build) for name, build in models.items()}


def by_lora_fx(base: nn.Module, rank: int, backend: Any) -> nn.Module:
    """Adapt both stacks with lora_fx: fp32 adapters."""
    spec = f"""lora 1
    adapter default {{
      rank = {rank}  alpha = {2 * rank}  init = random
      target parameter "experts.{{{",".join(STACKS)}}}"
    }}
    compile {{ unit = model }}"""
    return lora_fx.compile(base, spec, backend=backend)


def by_peft(base: nn.Module, rank: int, x: Tensor, upcast: bool) -> nn.Module:
    """Adapt both stacks with PEFT, eager. Raises ValueError if it computes something else."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in STACKS],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        model: Any = get_peft_model(twin(base), config, autocast_adapter_dtype=upcast)  # type: ignore[arg-type]
    ours: Any = by_lora_fx(base, rank, None)
    with torch.no_grad():
        for wrapper, name in ((model.experts.base_layer, STACKS[0]), (model.experts, STACKS[1])):
            site = ours.experts.lora_parameters[name]
            for factors, own in ((wrapper.lora_A, site.lora_A), (wrapper.lora_B, site.lora_B)):
                factors["default"].weight.copy_(own["default"].weight)
        got, want = ours(x).float(), model(x).float()
    off = ((got - want).norm() / want.norm()).item()
    if not off <= 8 * torch.finfo(x.dtype).eps:
        raise ValueError(f"it differs from lora_fx by {off:.2g}")
    return trained(model)


def arguments() -> argparse.Namespace:
    """Return what is given on the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=SHAPES, default="mixtral" if DEVICE == "cuda" else "small")
    made.add_argument("--rows", type=int, default=8192 if DEVICE == "cuda" else 1024)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--experts", choices=("grouped_mm", "batched_mm"), default="grouped_mm")
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype)
    add_times(made)
    return made.parse_args()


if __name__ == "__main__":
    main(arguments())
