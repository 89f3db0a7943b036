"""Convolutions of every dimension, stride, dilation, padding and number of groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.adapters.kinds import scatter

SCALING = 3 / 4
_PLAIN = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Case:
    """A layer and the size of an input; PEFT's branch is that of a plain layer, or is not."""

    kind: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    sizes: tuple[Any, ...]
    settings: Mapping[str, Any]
    input: tuple[int, ...]
    as_peft: bool = True

    def layer(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(self.kind(*self.sizes, **self.settings)).eval()

    def x(self) -> Tensor:
        return torch.randn(3, *self.input, generator=torch.Generator().manual_seed(1))

    @property
    def groups(self) -> int:
        return self.settings.get("groups", 1)


CASES = {
    "1d": Case(nn.Conv1d, (5, 7, 3), {"stride": 2, "padding": 1}, (5, 13)),
    "1d, dilation": Case(nn.Conv1d, (5, 7, 2), {"dilation": 3}, (5, 13), as_peft=False),
    "1d, same and reflect": Case(
        nn.Conv1d,
        (5, 7, 4),
        {"dilation": 2, "padding": "same", "padding_mode": "reflect"},
        (5, 13),
        as_peft=False,
    ),
    "1d, groups": Case(nn.Conv1d, (6, 10, 3), {"groups": 2, "padding": 1}, (6, 11)),
    "1d, one step": Case(nn.Conv1d, (5, 7, 1), {}, (5, 11)),
    "2d": Case(nn.Conv2d, (3, 7, (2, 5)), {"stride": (2, 1), "padding": (1, 2)}, (3, 8, 11)),
    "2d, without bias": Case(nn.Conv2d, (3, 7, 3), {"bias": False}, (3, 8, 11)),
    "2d, same": Case(nn.Conv2d, (3, 7, (3, 5)), {"padding": "same"}, (3, 8, 11)),
    "2d, same, uneven": Case(nn.Conv2d, (3, 7, (2, 4)), {"padding": "same"}, (3, 8, 11)),
    "2d, valid": Case(nn.Conv2d, (3, 7, 3), {"padding": "valid"}, (3, 8, 11)),
    "2d, circular": Case(
        nn.Conv2d,
        (3, 7, (2, 3)),
        {"padding": (1, 2), "padding_mode": "circular", "dilation": (1, 2)},
        (3, 8, 11),
        as_peft=False,
    ),
    "2d, replicate": Case(
        nn.Conv2d, (3, 7, 3), {"padding": 1, "padding_mode": "replicate"}, (3, 8, 11), as_peft=False
    ),
    "2d, one place": Case(nn.Conv2d, (5, 7, 1), {}, (5, 8, 11)),
    "2d, by channel": Case(nn.Conv2d, (4, 8, 3), {"groups": 4}, (4, 9, 6)),
    "3d": Case(
        nn.Conv3d, (2, 7, (1, 2, 3)), {"stride": (1, 2, 1), "padding": (0, 1, 1)}, (2, 3, 5, 6)
    ),
    "3d, one place": Case(nn.Conv3d, (5, 7, 1), {}, (5, 3, 4, 6)),
    "3d, line": Case(nn.Conv3d, (2, 7, (1, 1, 3)), {"padding": "same"}, (2, 3, 5, 6)),
}
MERGED = [name for name, case in CASES.items() if case.groups == 1]
VARIANTS = {
    "lora": "",
    "lora_bias": "lora_bias = true",
    "rslora": "scaling = rslora  lora_bias = true",
    "dora": "variant = dora",
    "bias": "bias = lora_only",
}


def applies(case: Case, variant: str) -> bool:
    if variant in ("lora_bias", "rslora", "bias") and not case.settings.get("bias", True):
        return False
    return variant != "dora" or case.groups == 1


PAIRS = [(n, v) for n, case in CASES.items() for v in VARIANTS if applies(case, v)]


def compiled(case: Case, adapter: str, backend: str | None, base: nn.Module | None = None) -> Any:
    """The layer with an adapter of rank 4, none of whose tensors is zero, or the base's."""
    text = f"""lora 1 adapter default {{
        rank = 4  alpha = 3  init = random  {adapter}  target class "{case.kind.__name__}" }}"""
    model = lora_fx.compile(base or case.layer(), text, backend=backend)
    scatter(model)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapter, by its name in a file below the layer's."""
    live = live_tensors(model, "default")
    return {name.removeprefix("0.").removeprefix("base_layer."): t for name, t in live.items()}


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of the adapter and the input; dropout draws the same each time."""
    model.zero_grad()
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().mean().backward()
    grads = {name: t.grad.clone() for name, t in state_of(model).items() if t.grad is not None}
    assert x.grad is not None
    return {"output": output.detach(), "x": x.grad, **grads}


def dense(case: Case, state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The same in float64, with the weight that the adapter makes of the layer's."""
    leaves = {name: t.detach().double().requires_grad_() for name, t in state.items()}
    x = case.x().double().requires_grad_()
    output = by_dense_weight(case, leaves, x, scaling)
    output.square().mean().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def by_dense_weight(case: Case, leaves: Mapping[str, Tensor], x: Tensor, scaling: float) -> Tensor:
    """The layer with W + s B A, or DoRA's, for a weight, as torch convolves; without groups."""
    layer: Any = case.layer().double()[0]
    weight = ungrouped(layer.weight.detach(), case.groups)
    A, B = leaves["lora_A.weight"], leaves["lora_B.weight"].flatten(1)
    blocks = torch.block_diag(*B.chunk(case.groups))
    weight = weight + scaling * (blocks @ A.flatten(1)).view_as(weight)
    if "lora_magnitude_vector" in leaves:
        norms = weight.detach().flatten(1).norm(dim=1)
        m = leaves["lora_magnitude_vector"].flatten()
        weight = weight * (m / norms).view(-1, *(1,) * (weight.dim() - 1))
    bias = leaves.get("bias", layer.bias)
    if "lora_B.bias" in leaves:
        bias = bias + scaling * leaves["lora_B.bias"]
    if layer.padding_mode == "zeros":
        how = layer.stride, layer.padding, layer.dilation
        return _PLAIN[weight.dim() - 3](x, weight, bias, *how)
    layer.groups = 1
    return layer._conv_forward(x, weight, bias)


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The weight of a layer without groups that computes what one with groups does."""
    out, inside, *kernel = weight.shape
    whole = weight.new_zeros(out, inside * groups, *kernel)
    for group, rows in enumerate(weight.chunk(groups)):
        high = out // groups
        own = slice(group * inside, (group + 1) * inside)
        whole[group * high : (group + 1) * high, own] = rows
    return whole
