"""Compare the plan's memory estimate with the peak of real training steps, on one GPU.

Llama-3-8B-shaped layers, bf16 base, rank 16 on all linears, `unit = layers`. The peak is that of
the second AdamW step, all allocations of the process counted; the goal is within 10 %. The estimate
is of what is kept, compiled or not, the total with parameters, gradients and optimizer.

    python -m tests.benchmarks.estimated_memory
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

SHAPES = ((4, 2, 2048), (4, 1, 4096), (8, 2, 1024))
GIB = 2**30


def main(vocabulary: int, out: Path | None) -> None:
    """Print the table."""
    cases = [
        (*shape, checkpoint, backend)
        for shape in SHAPES
        for checkpoint in ("none", "layers")
        for backend in ("inductor", None)
    ]
    found = [
        measured(*case, vocabulary)
        for case in track(cases, "measuring", console=Console(stderr=True))
    ]
    device = torch.cuda.get_device_name()
    title = f"GiB; bf16, rank 16, {vocabulary} words, {device}"
    names = ("layers", "batch", "checkpoint", "backend", "estimate", "peak", "estimate / peak")
    table = Table(*names, "activations: estimate", "peak less the rest", title=title)
    for one in found:
        ratio = f"{one['estimate'] / one['peak']:.3f}"
        sizes = [f"{one[name] / GIB:.2f}" for name in ("estimate", "peak")]
        parts = [f"{one[name] / GIB:.2f}" for name in ("activations", "measured activations")]
        table.add_row(*one["case"], *sizes, ratio, *parts)
    Console().print(table)
    if out:
        out.write_text(json.dumps({"device": device, "cases": found}, indent=2))


def measured(
    layers: int, samples: int, tokens: int, checkpoint: str, backend: Any, vocabulary: int
) -> dict[str, Any]:
    """Estimate one case, run it, and return bytes."""
    text = f"""lora 1
    adapter default {{ rank = 16 alpha = 32 target linear }}
    compile {{ unit = layers checkpoint = {checkpoint} }}"""
    model: Any = lora_fx.compile(base(layers, vocabulary), text, backend=backend, inplace=True)
    estimate = model.lora_fx_plan.memory(samples, tokens, compiled=backend is not None)
    ids = torch.randint(vocabulary, (samples, tokens), device="cuda")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del model, optimizer
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    rest = estimate["total"] - estimate["activations"]
    return {
        "case": (str(layers), f"{samples}×{tokens}", checkpoint, str(backend)),
        "estimate": estimate["total"],
        "activations": estimate["activations"],
        "measured activations": peak - rest,
        "peak": peak,
        "parts": estimate,
    }


def base(layers: int, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        dtype="bfloat16",
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--json", type=Path, dest="out", help="also write every number there")
    main(**vars(parser.parse_args()))
