"""Time a training step of Llama-3-8B-shaped layers beside the frozen base and PEFT, on one GPU.

Forward and backward of the decoder, bf16 base, rank 16 on all linears. Runs are interleaved;
medians, spread, ratios to the frozen base compiled per layer, and memory on top of the models.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

SPEC = """lora 1
adapter default { rank = 16 alpha = 32 target linear }
compile { unit = layers }"""


def main(layers: int, samples: int, tokens: int, rounds: int) -> None:
    """Print the table."""
    decoders = candidates(frozen_base(layers))
    embeddings = torch.randn(
        samples, tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    for decoder in track(list(decoders.values()), "compiling", console=Console(stderr=True)):
        for _ in range(2):
            step(decoder, embeddings)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in track(range(rounds), "timing", console=Console(stderr=True)):
        for name, decoder in decoders.items():
            times[name].append(milliseconds(lambda d=decoder: step(d, embeddings)))
    floor = statistics.median(times["frozen base, compiled per layer"])
    shape = f"{layers} layers, {samples}×{tokens} tokens, bf16, {torch.cuda.get_device_name()}"
    table = Table("training step", "ms", "spread", "ratio", "GiB", title=shape)
    for name, decoder in decoders.items():
        median, low, high = statistics.median(times[name]), min(times[name]), max(times[name])
        gib = peak(lambda d=decoder: step(d, embeddings))
        spread = f"{low:.1f}–{high:.1f}"
        table.add_row(name, f"{median:.1f}", spread, f"{median / floor:.3f}", f"{gib:.2f}")
    Console().print(table)


def frozen_base(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).train()


def candidates(base: LlamaForCausalLM) -> dict[str, nn.Module]:
    return {
        "frozen base, compiled per layer": per_layer(copy.deepcopy(base).model),
        "lora_fx, float32 adapters": lora_fx.compile(base, SPEC).model,
        "PEFT as shipped (float32), compiled per layer": per_layer(peft(base, upcast=True)),
        "PEFT with bf16 adapters, compiled per layer": per_layer(peft(base, upcast=False)),
        "PEFT as shipped, eager": peft(base, upcast=True),
    }


def peft(base: LlamaForCausalLM, upcast: bool) -> nn.Module:
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=upcast)
    return model.base_model.model.model


def per_layer(decoder: nn.Module) -> nn.Module:
    for layer in decoder.layers:
        layer.compile()
    return decoder


def step(decoder: nn.Module, embeddings: torch.Tensor) -> None:
    hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden.backward(torch.ones_like(hidden))


def milliseconds(run: Callable[[], None], repeats: int = 3) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def peak(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    main(**vars(parser.parse_args()))
