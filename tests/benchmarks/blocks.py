"""Single blocks of a layer, forward and backward: lora_fx beside PEFT, Unsloth and LoRAFusion.

`qkv`: the three projections of one input; `o`: the projection after attention; `mlp`: gate, up and
down with SwiGLU. In bf16, interleaved, with gradients to the block's input. Unsloth and LoRAFusion
take part if they can be imported (`pip install --no-deps unsloth unsloth_zoo`; LoRAFusion from its
repository, CentML/lorafusion).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from tests.benchmarks import decoders as d
from tests.benchmarks.adapted import (
    Adapter,
    by_lora_fx,
    by_peft,
    trainable,
    training_step,
    twin,
)
from tests.benchmarks.command import chosen, parser, settings
from tests.benchmarks.fused_functions import Forward, Fused, checked, lorafusion, unsloth
from tests.benchmarks.interleaved import DEVICE, Build, Step, machine, measure
from tests.benchmarks.record import Record
from tests.benchmarks.table import Goal, show, show_goals

FLOOR = "frozen base, compiled"
OURS = "lora_fx"
OURS_DRY = "lora_fx, dropout 0"
UNSLOTH = "Unsloth's functions, bf16 adapters"
UNSLOTH_FP32 = "Unsloth's functions, fp32 adapters"
LORAFUSION = "LoRAFusion's linear, bf16 adapters"
RIVALS = {  # what each takes over what lora_fx takes, at least
    "PEFT, bf16 adapters, compiled": None,
    "PEFT as shipped (fp32 adapters), compiled": None,
    "PEFT, bf16 adapters, eager": None,
    "PEFT as shipped (fp32 adapters), eager": None,
    UNSLOTH: 1.1,
    UNSLOTH_FP32: 1.1,
    LORAFUSION: 1.0,
}
ALWAYS = (FLOOR, OURS)
STATED = {"shape": "llama-8b", "tokens": "2×4096", "rank": 16}


class QKV(nn.Module):
    """The projections before attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        attention = LlamaAttention(config, layer_idx=0)
        self.q_proj = attention.q_proj
        self.k_proj = attention.k_proj
        self.v_proj = attention.v_proj

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class Output(nn.Module):
    """The projection after attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.o_proj = LlamaAttention(config, layer_idx=0).o_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(x)


BLOCKS: dict[str, Callable[[LlamaConfig], nn.Module]] = {"qkv": QKV, "o": Output, "mlp": LlamaMLP}


def main(given: argparse.Namespace) -> None:
    """Print a table for each block."""
    for block in given.blocks:
        builds = training_steps(block, given)
        names = chosen(list(builds), given.only, ALWAYS)
        record = Record(given.json, settings(given, benchmark="block", block=block), machine())
        measure({name: builds[name] for name in names}, given.rounds, record, ALWAYS)
        show(record, FLOOR)
        stated = DEVICE == "cuda" and STATED.items() <= record.settings.items()
        show_goals(goals(record), stated)


def training_steps(block: str, given: argparse.Namespace) -> dict[str, Build]:
    """Return how to build each candidate's step."""
    base = frozen_block(block, given.shape)
    linears = [name for name, module in base.named_children() if isinstance(module, nn.Linear)]
    adapter = Adapter(given.rank, given.dropout, tuple(linears))
    x = torch.randn(
        given.samples, given.tokens, d.SHAPES[given.shape][d.HIDDEN],
        device=DEVICE, dtype=torch.bfloat16, requires_grad=True,
    )  # fmt: skip
    with torch.no_grad():
        gradients = [torch.randn_like(y) for y in outputs(base(x))]

    def built(build: Callable[[], Any]) -> Step:
        model = build()
        return training_step(lambda: outputs(model(x)), gradients, [x, *trainable(model)])

    models = candidates(block, base, adapter, x)
    return {name: lambda build=build: built(build) for name, build in models.items()}


def candidates(
    block: str, base: nn.Module, adapter: Adapter, x: Tensor
) -> dict[str, Callable[[], Any]]:
    """Return how to build each candidate, all on the weights of `base`, to run with input `x`."""
    peft_bf16 = partial(by_peft, base, adapter, upcast=False)
    peft_fp32 = partial(by_peft, base, adapter, upcast=True)
    dry = {OURS_DRY: lambda: by_lora_fx(base, adapter.dry(), "model")}

    def fused(library: Callable[[str], Forward], model: Callable[[], nn.Module]) -> Fused:
        return checked(Fused(library(block), model()), x)

    rivals = (
        lambda: torch.compile(peft_bf16()),
        lambda: torch.compile(peft_fp32()),
        peft_bf16,
        peft_fp32,
        lambda: fused(unsloth, peft_bf16),
        lambda: fused(unsloth, peft_fp32),
        lambda: fused(lorafusion, peft_bf16),
    )
    return {
        FLOOR: lambda: torch.compile(twin(base)),
        OURS: lambda: by_lora_fx(base, adapter, "model"),
        **(dry if adapter.dropout else {}),
        **dict(zip(RIVALS, rivals, strict=True)),
    }


def frozen_block(block: str, shape: str) -> nn.Module:
    """Build a bf16 block with random weights on the GPU, or on the CPU if there is none."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return BLOCKS[block](d.config_of(shape, 1)).bfloat16().requires_grad_(False).train()


def outputs(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else given


def goals(record: Record) -> list[Goal]:
    """Return the goals of `performance.md`, and dropout's of `architecture.md`."""
    found = [
        Goal("", f"{name} / {OURS}", record.ratio(name, OURS), bound, least=True)
        for name, bound in RIVALS.items()
    ]
    return [*found, Goal("T3", f"dropout / {OURS_DRY}", record.ratio(OURS, OURS_DRY), 1.04)]


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    main(arguments.parse_args())
