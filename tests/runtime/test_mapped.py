"""A base that is built on meta, and whose weights are then mapped in from its file."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import lora_fx
from tests.tiny import assert_equal, generate, llama, spec, step, tokens


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> LlamaForCausalLM:
    """The model of `read`, not read."""
    saved = llama()
    saved.to(request.param).save_pretrained(tmp_path)
    with init_empty_weights():
        model = LlamaForCausalLM(saved.config)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    return model


def mapped(model: nn.Module, file: Path) -> bool:
    """Whether every weight of the base lies where the process has mapped the file."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    ends = [re.match(r"(\w+)-(\w+)", line) for line in lines]
    ranges = [range(int(end[1], 16), int(end[2], 16)) for end in ends if end]
    weights = [p.data_ptr() for n, p in model.named_parameters() if "lora_" not in n]
    return bool(weights) and all(any(w in part for part in ranges) for w in weights)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_no_weight_is_copied(base: LlamaForCausalLM, tmp_path: Path) -> None:
    model = lora_fx.compile(base, spec(), backend=None)
    step(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    again = lora_fx.load(tmp_path / "adapter", base, backend=None)
    generate(again, tokens())
    file = tmp_path / "model.safetensors"
    assert mapped(base, file)
    assert mapped(model, file)
    assert mapped(again, file)
    assert not mapped(llama(), file)


def test_it_computes_the_same(base: LlamaForCausalLM, tmp_path: Path) -> None:
    read = LlamaForCausalLM.from_pretrained(tmp_path, dtype=base.dtype)
    plain, model = (lora_fx.compile(m, spec(), backend=None) for m in (read.train(), base.train()))
    assert_equal(step(model, tokens()), step(plain, tokens()), 1e-6)
