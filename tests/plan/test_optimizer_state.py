import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

import lora_fx
from lora_fx.plan.optimizer_state import state_bytes
from lora_fx.spec.spec import OptimizerSpec
from tests.plan.models import Tower


def named(text: str) -> OptimizerSpec:
    optimizer = lora_fx.parse(f"lora 1 optimizer {{ lr = 1e-3 {text} }}").optimizer
    assert optimizer is not None
    return optimizer


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("name = adamw", torch.optim.AdamW),
        ("name = sgd", torch.optim.SGD),
        ("name = sgd momentum = 0.9", lambda p: torch.optim.SGD(p, momentum=0.9)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_torch_keeps(text: str, make: type[torch.optim.AdamW], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(7, 11, dtype=dtype))
    optimizer = make([parameter])
    parameter.sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values()]
    bytes = sum(t.nbytes for t in kept if torch.is_tensor(t) and t.ndim)
    assert state_bytes(77, dtype.itemsize, named(text)) == bytes


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
@pytest.mark.parametrize("elements", [4095, 4096, 4097, 100_000])
def test_what_bitsandbytes_keeps(name: str, elements: int) -> None:
    parameter = nn.Parameter(torch.ones(elements, dtype=torch.bfloat16))
    optimizer = AdamW8bit([parameter])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    kept = optimizer.state[parameter].items()
    bytes = sum(t.nbytes for key, t in kept if torch.is_tensor(t) and "qmap" not in key)
    assert state_bytes(elements, 2, named(f"name = {name}")) == bytes


def test_adamw_is_the_default() -> None:
    assert state_bytes(3, 4, None) == state_bytes(3, 4, named("name = adamw")) == 2 * 3 * 4


def test_memory_follows_the_spec() -> None:
    text = "lora 1 adapter x { rank = 2 target up }"
    with_sgd = lora_fx.plan(f"{text} optimizer {{ name = sgd lr = 1e-3 }}", Tower(3)).memory()
    assert with_sgd["optimizer"] == 0
    assert with_sgd["gradients"] == 4 * 3 * 2 * (5 + 7)
    fa = lora_fx.plan(f"{text} optimizer {{ name = lora_fa lr = 1e-3 }}", Tower(3)).memory()
    assert fa["gradients"] == 4 * 3 * 2 * 7
    assert fa["optimizer"] == 2 * fa["gradients"]
