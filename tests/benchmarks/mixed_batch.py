"""A batch in which every sample has an adapter of its own, beside PEFT and the base.

N adapters, each on all linears; sample i has adapter i modulo N. Forward without gradients, PEFT's
by `adapter_names`, which loops over the adapters; with `--train` forward and backward, which PEFT
cannot. lora_fx is measured as it chooses, with each way of its rules forced, and with a batch of
the base alone. With `--slots` all adapters but the first are loaded into slots. `--tokens 1
--graphs` is a step of decoding: the whole model is one CUDA graph, the base's too.

    python -m tests.benchmarks.mixed_batch [--adapters 64] [--train] [--slots] [--json FILE]
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import lora_fx
from lora_fx import kernels
from lora_fx.rules import gather_samples
from tests.benchmarks.adapted import trainable, training_step, twin
from tests.benchmarks.command import add_times, chosen
from tests.benchmarks.decoders import ATTENTION, MLP, SHAPES, config_of
from tests.benchmarks.interleaved import DEVICE, Build, Step, machine, measure
from tests.benchmarks.record import Record
from tests.benchmarks.table import Goal, show, show_goals

FLOOR = "frozen base, compiled"
OURS = "lora_fx, mixed"
WAYS = {  # whether factors are picked in kernels, and otherwise gathered
    "lora_fx, mixed, all adapters masked": (False, False),
    "lora_fx, mixed, gathered": (False, True),
    "lora_fx, mixed, in kernels": (True, False),
}
ONE = "lora_fx, one adapter"
NONE = "lora_fx, mixed, all of the base"
PEFT = "PEFT, adapter_names, eager"
ALWAYS = (FLOOR, OURS)


def main(given: argparse.Namespace) -> None:
    """Print the table."""
    builds = steps(given)
    told: dict[str, str | int | float] = {
        "benchmark": "mixed training" if given.train else "mixed forward",
        "shape": given.shape,
        "tokens": f"{given.samples}×{given.tokens}",
        "adapters": given.adapters,
        "rank": given.rank,
        "layers": given.layers,
        "dtype": given.dtype,
        "adapters' dtype": given.adapter_dtype,
        "slots": str(given.slots),
        "CUDA graphs": str(given.graphs),
    }
    record = Record(given.json, told, machine())
    names = chosen(list(builds), given.only, ALWAYS)
    measure({name: builds[name] for name in names}, given.rounds, record, ALWAYS)
    show(record, FLOOR)
    one = Goal("X1", f"{OURS} / {ONE}", record.ratio(OURS, ONE), 1.05 if given.train else None)
    if given.graphs:
        least = 0.9 if given.adapters <= 8 else 0.78
        base = Goal("I2", f"{FLOOR} / {OURS}", record.ratio(FLOOR, OURS), least, least=True)
    else:
        wanted = None if given.train else 1.1
        base = Goal("I1", f"{OURS} / {FLOOR}", record.ratio(OURS, FLOOR), wanted)
    alone = Goal("", f"{NONE} / {FLOOR}", record.ratio(NONE, FLOOR))
    beside = [Goal("", f"{name} / {OURS}", record.ratio(name, OURS)) for name in (*WAYS, PEFT)]
    show_goals([one, base, alone, *beside], given.shape == "llama-8b" and DEVICE == "cuda")


def steps(given: argparse.Namespace) -> dict[str, Build]:
    """Return how to build each candidate's step on the weights of one base."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = config_of(given.shape, given.layers)
        base = LlamaForCausalLM(config).to(getattr(torch, given.dtype)).requires_grad_(False)
        ids = torch.randint(1, config.vocab_size, (given.samples, given.tokens))
        x = base.get_input_embeddings()(ids).detach().requires_grad_(given.train)
    adapters = [f"a{i}" for i in range(given.adapters)]
    names = [adapters[i % len(adapters)] for i in range(given.samples)]

    def stepping(model: nn.Module, **more: Any) -> Step:
        model.train(given.train)  # once: it visits every module

        def forward() -> torch.Tensor:
            return model(inputs_embeds=x, **more).logits

        if given.train:
            leaves = [x, *trainable(model)]
            return training_step(lambda: [forward()], [torch.ones_like(forward())], leaves)

        @torch.no_grad()
        def step() -> None:
            forward()

        return step

    def ours(active: list[str], way: tuple[bool, bool] | None = None, **more: Any) -> Step:
        model = by_lora_fx(base, active, given)
        if way is None:
            return stepping(model, **more)
        in_kernel, gathered = way
        with (
            patch.object(kernels, "are_on", lambda *_: in_kernel),
            patch.object(gather_samples, "is_gathered", lambda *_: gathered),
        ):
            step = stepping(model, **more)
            step()
        return step

    def theirs() -> Step:
        model = by_peft(base, adapters, given.rank)
        checked(model, by_lora_fx(base, adapters, given, None), x, names)
        return stepping(model, adapter_names=names)

    mixed = partial(ours, adapters, adapter_names=names)
    builds: dict[str, Build] = {
        FLOOR: lambda: stepping(compiled(base, given.graphs)),
        OURS: mixed,
        **{name: partial(mixed, way) for name, way in WAYS.items()},
        ONE: partial(ours, adapters[:1]),
    }
    if given.train:
        return builds
    of_base = partial(ours, adapters, adapter_names=["__base__"] * given.samples)
    return {**builds, NONE: of_base, PEFT: theirs}


def compiled(base: LlamaForCausalLM, graphs: bool) -> nn.Module:
    """Compile a copy per layer, as lora_fx does, or as a whole with CUDA graphs."""
    model = twin(base)
    if graphs:
        model.compile(mode="reduce-overhead")
        return model
    for layer in model.model.layers:
        layer.compile()
    return model


def by_lora_fx(
    base: nn.Module, adapters: list[str], given: argparse.Namespace, backend: Any = "inductor"
) -> nn.Module:
    """Adapt with lora_fx; of adapters in slots all have the values of the first."""
    rank = given.rank
    what = f"rank = {rank}  alpha = {2 * rank}  init = random  dtype = {given.adapter_dtype}"
    of_spec = adapters[:1] if given.slots else adapters
    text = [f"adapter {name} {{ {what}  target linear }}" for name in of_spec]
    if len(adapters) > 1:
        slots = f"slots = {len(adapters)}" if given.slots else "train = true"
        text.append(f"route {{ {slots} }}")
    if given.graphs:
        text.append('compile { unit = model  mode = "reduce-overhead" }')
    model = lora_fx.compile(base, "\n".join(["lora 1", *text]), backend=backend)
    if given.slots:
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for name in adapters[1:]:
                model.load_adapter(Path(folder) / adapters[0], name)
    return model


def by_peft(base: nn.Module, adapters: list[str], rank: int) -> Any:
    """Adapt with PEFT."""
    targets = [*ATTENTION, *MLP]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(twin(base), config, adapter_name=adapters[0])  # type: ignore[arg-type]
        for name in adapters[1:]:
            model.add_adapter(name, config)
    return model.eval()


@torch.no_grad()
def checked(theirs: Any, ours: Any, x: torch.Tensor, names: list[str]) -> None:
    """Give PEFT our adapters. Raises ValueError if it computes something else."""
    parameters = dict(theirs.base_model.model.named_parameters())
    for name, value in ours.named_parameters():
        if "lora_" in name:
            parameters[name].copy_(value)
    got, want = (m(inputs_embeds=x, adapter_names=names).logits for m in (ours.eval(), theirs))
    off = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if not off <= 8 * torch.finfo(x.dtype).eps:
        raise ValueError(f"it differs from lora_fx by {off:.2g}")


def arguments() -> argparse.Namespace:
    """Return what is given on the command line."""
    gpu = DEVICE == "cuda"
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shape", choices=SHAPES, default="llama-8b" if gpu else "tiny")
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--adapters", type=int, default=64 if gpu else 16)
    made.add_argument("--samples", type=int, default=64 if gpu else 16)
    made.add_argument("--tokens", type=int, default=128 if gpu else 32)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--dtype", choices=("bfloat16", "float32"),
                      default="bfloat16" if gpu else "float32")  # fmt: skip
    made.add_argument("--train", action="store_true", help="forward and backward")
    made.add_argument("--adapter-dtype", choices=("bfloat16", "float32"), default="float32")
    made.add_argument("--slots", action="store_true", help="all adapters but the first in slots")
    made.add_argument("--graphs", action="store_true", help="the whole model in a CUDA graph")
    add_times(made)
    return made.parse_args()


if __name__ == "__main__":
    main(arguments())
