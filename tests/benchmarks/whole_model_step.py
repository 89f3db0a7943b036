"""A training step of `unit = model` beside `unit = layers`, and of layers within a memory budget.

    python -m tests.benchmarks.whole_model_step [--tiny]

Llama-3-8B layer shapes, 8 layers, 2×4096 tokens, bf16, rank 16 on all linears; `--tiny` is a small
model on the CPU, to see that it runs. Each variant is timed in turn, round by round; printed are
medians, the ratio to the first, the peak of memory and the attention kernel that ran.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.autograd.profiler_util import EventList
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx

SPEC = """lora 1
adapter default {{ rank = 16  init = random  target linear except lm_head }}
compile {{ {} }}"""
VARIANTS = {
    "layers": ("unit = layers", "ones"),
    "model, no mask": ("unit = model", "none"),
    "model, ones": ("unit = model", "ones"),
    "model, one token padded": ("unit = model", "padded"),
    "layers, budget(0.7)": ("checkpoint = budget(0.7)", "ones"),
    "layers, budget(0.4)": ("checkpoint = budget(0.4)", "ones"),
    "layers, budget(0)": ("checkpoint = budget(0)", "ones"),
    "checkpoint = layers": ("checkpoint = layers", "ones"),
}
ROUNDS = 7


def build(tiny: bool) -> tuple[nn.Module, torch.Tensor]:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4}
    config = LlamaConfig(
        num_hidden_layers=2 if tiny else 8,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=4096,
        max_position_embeddings=8192,
        **sizes,
    )
    device = "cpu" if tiny else "cuda"
    model = LlamaForCausalLM(config).to(device, torch.float32 if tiny else torch.bfloat16)
    return model, torch.randint(1, 4096, (2, 64 if tiny else 4096), device=device)


def step(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
    model.zero_grad()


def kernels(events: EventList) -> str:
    names = {e.key for e in events if "attention" in e.key and "backward" not in e.key}
    return ", ".join(sorted(n.removeprefix("aten::_scaled_dot_product_") for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    base, ids = build(tiny)
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[0, -1] = 0
    masks = {"none": None, "ones": ones, "padded": padded}
    models = {n: lora_fx.compile(base, SPEC.format(c)).train() for n, (c, _) in VARIANTS.items()}
    runs = {n: lambda n=n: step(models[n], ids, masks[VARIANTS[n][1]]) for n in VARIANTS}
    wait = (lambda: None) if tiny else torch.cuda.synchronize
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks, used = {}, {}
    for name, run in runs.items():
        run(), run()
        if not tiny:
            torch.cuda.reset_peak_memory_stats()
        before = 0 if tiny else torch.cuda.memory_allocated()
        with torch.profiler.profile() as profile:
            run()
        wait()
        peaks[name] = 0 if tiny else torch.cuda.max_memory_allocated() - before
        used[name] = kernels(profile.key_averages())
    for _ in range(ROUNDS):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    first = statistics.median(times["layers"])
    print("cpu" if tiny else torch.cuda.get_device_name(), torch.__version__)
    for name, all_times in times.items():
        median = statistics.median(all_times)
        print(
            f"{name:26} {1e3 * median:9.2f} ms  {median / first:6.3f}  "
            f"{peaks[name] / 1e9:6.2f} GB  {used[name]}"
        )


if __name__ == "__main__":
    main()
