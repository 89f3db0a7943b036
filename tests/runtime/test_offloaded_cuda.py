"""Bases that `device_map="auto"` spreads over GPUs, CPU and disk; run with `pytest -m gpu`."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import lora_fx
from lora_fx.diagnostics import LoraFxError
from tests.tiny import assert_equal, generate, llama, step, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

SPEC = 'lora 1 adapter default { rank = 4 init = random target linear train "model.norm" }\n'
LAYERS, WIDTH = 8, 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama(LAYERS, hidden_size=WIDTH, intermediate_size=3 * WIDTH).save_pretrained(tmp_path)
    return tmp_path


def spread(folder: Path, **memory: Any) -> nn.Module:
    """The model, with so much memory (in KiB) on each device."""
    limits = {int(k[3:]) if k.startswith("gpu") else k: v * 1024 for k, v in memory.items()}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=limits, offload_folder=folder / "offload"
    ).train()


def assert_same(model: nn.Module, folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder).cuda().train()
    whole = lora_fx.compile(plain, SPEC, backend=None)
    for ids in (tokens(3).cuda(), tokens(2).cuda()):
        got = {name: t.to("cuda:0") for name, t in step(model, ids).items()}
        assert_equal(got, step(whole, ids), 5e-5)
    assert torch.equal(generate(model.eval(), ids), generate(whole.eval(), ids))


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_offloaded_to_the_cpu_and_a_disk(backend: Any, folder: Path) -> None:
    base = spread(folder, gpu0=9_000, cpu=9_000)
    assert set(base.hf_device_map.values()) == {0, "cpu", "disk"}
    model = lora_fx.compile(base, SPEC, backend=backend)
    trained = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    assert {p.device for p in trained} == {torch.device("cuda:0")}
    assert_same(model, folder)


def test_weights_go_again(folder: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    size = sum(parameter.nbytes for parameter in plain.parameters())
    x = torch.ones(8, 8, device="cuda", requires_grad=True)
    (x @ x).sum().backward()  # allocates what cuBLAS keeps
    gc.collect()
    start = torch.cuda.memory_allocated()
    text = SPEC + "compile { checkpoint = layers }"
    model = lora_fx.compile(spread(folder, gpu0=9_000, cpu=60_000), text, backend="eager")
    step(model, tokens().cuda())
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert before - start < 0.5 * size
    step(model, tokens().cuda())
    assert torch.cuda.max_memory_allocated() - before < 0.5 * size


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_two_gpus(backend: Any, folder: Path) -> None:
    base = spread(folder, gpu0=14_000, gpu1=14_000, cpu=60_000)
    assert {0, 1} <= set(base.hf_device_map.values())
    assert_same(lora_fx.compile(base, SPEC, backend=backend), folder)
    with pytest.raises(LoraFxError, match="runs on the devices 0, 1"):
        lora_fx.compile(base, SPEC + "compile { unit = model }")
