"""Adapters of every kind on a small module that has every kind of layer."""

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import scatter
from tests.dense import relative
from tests.odd_models import Varied

IDS = torch.tensor([[0, 3, 5, 7], [1, 3, 10, 0], [2, 2, 9, 6]])
KINDS = {
    "linear": "target up",
    "transposed": "target mix",
    "lora_bias": "lora_bias = true  target up, mix",
    "embedding": "target embed",
    "dropout": "dropout = 0.3  target up, mix",
    "dora": "variant = dora  target up, mix, embed",
    "dora, dropout": "variant = dora  dropout = 0.3  bias = lora_only  target up, mix",
    "dora and lora": "variant = dora  target up, embed  target mix { variant = lora }",
    "bdlora": """variant = bdlora(b = ["up"], blocks = 2, strict = false)  target mix, up
    """,
    "velora": "variant = velora(num_groups = 3)  target mix, up",
    "velora, dropout": "variant = velora(num_groups = 3, scale = 2)  dropout = 0.3  target up",
    "tie": "tie = true  target embed",
    "bias = all": "bias = all  target mix",
    "bias = lora_only": "bias = lora_only  target up",
    "train": "target mix  train norm, up, head",
    "train, with buffers": "target mix  train counts",
    "train, tied": "tie = true  target mix  train embed",
    "tokens": "target mix  tokens [0, 3, 9] in embed",
    "parameter": 'target parameter "up.weight"',
    "stack": 'target up, parameter "experts"',
    "all": "bias = all  lora_bias = true  target up, mix  train norm  tokens [3] in embed",
}


def compiled(adapter: str, backend: str | None, base: Varied | None = None) -> nn.Module:
    text = f"lora 1 adapter default {{ rank = 2  alpha = 3  init = random  {adapter} }}"
    model = lora_fx.compile(base or Varied(), text, backend=backend)
    scatter(model)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """Output and gradients, by adapter and name; dropout draws the same at every call."""
    model.zero_grad()
    torch.manual_seed(7)
    output = model(IDS)
    output.square().mean().backward()
    live = {
        f"{a} {n}": t for a in model.lora_fx_adapters for n, t in live_tensors(model, a).items()
    }
    grads = {n: t.grad.clone() for n, t in live.items() if t.is_leaf and t.grad is not None}
    return {"output": output.detach(), **grads}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert len(want) > 1
    for name, tensor in want.items():
        assert tensor.norm() > 0, name
        assert relative(got[name], tensor) < 1e-5, name
