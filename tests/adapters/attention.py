"""`nn.MultiheadAttention` with adapters, and with W + s B A in the place of its weights."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters import storage
from lora_fx.adapters.sites.factors import Factors

SPEC = "lora 1 adapter a { rank = 3  alpha = 6  init = random  target attn }"
E, HEADS, KEYS, VALUES = 12, 4, 10, 9  # wide
L, S, N = 7, 5, 3
MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "separate": {"kdim": KEYS, "vdim": VALUES},
    "separate, no bias": {"kdim": KEYS, "vdim": VALUES, "bias": False, "batch_first": True},
    "own keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own keys, separate": {"kdim": KEYS, "add_bias_kv": True, "batch_first": True},
    "zeros": {"add_zero_attn": True, "batch_first": True},
}


class Attending(nn.Module):
    """An attention inside a model, which hands everything on."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **how)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attn(*args, **kwargs)


def attending(dtype: torch.dtype = torch.float64, **how: Any) -> Attending:
    torch.manual_seed(0)
    model = Attending(**how).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():  # biases are zero otherwise
        nn.init.normal_(parameter, std=0.3)
    return model


def dense(model: Any, base: nn.Module, *adapters: str) -> nn.Module:
    """The base with W + Σ s B A in float64, of what the adapters are now.

    With magnitudes, of one adapter, each row has its own; what an init took out is left out.
    """
    twin = copy.deepcopy(base).double()
    for name, site in storage.sites(model):
        weight, change = site.lora_place[1], site.lora_change
        fqn = name if weight == "weight" else name.rpartition(".")[0]
        parameter = twin.get_submodule(fqn).get_parameter(weight)
        for adapter in adapters or ("a",):
            if adapter in site.lora_branches:
                branch = site.lora_branches[adapter]
                W = parameter + site.lora_arithmetic[adapter].scaling * _product(branch)
                if change is not None and change.adapter == adapter:
                    W = W - change.arithmetic.scaling * _product(change.factors)
                if branch.magnitude is not None:
                    m = branch.magnitude.weight.detach().double()
                    W = (m / W.norm(dim=1))[:, None] * W
                parameter.data = W
    return twin


def _product(branch: Factors) -> Tensor:
    A, B = (factor.weight.detach().double() for factor in (branch.A, branch.B))
    return B @ A


def compiled(base: nn.Module, text: str = SPEC, backend: str | None = None) -> Any:
    return lora_fx.compile(base, text, backend=backend)


def some(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(attention: nn.MultiheadAttention, kind: str = "different", **how: Any) -> list[Tensor]:
    """Query, key and value in a module's layout: one tensor, two or three; or without batch."""
    batch = () if kind == "unbatched" else (N,)

    def one(length: int, width: int, seed: int) -> Tensor:
        first = attention.batch_first or not batch
        shape = (*batch, length) if first else (length, *batch)
        return some(*shape, width, seed=seed, **how)

    q = one(L, E, 1)
    if kind == "same" and attention.kdim == attention.vdim == E:
        return [q, q, q]
    k = one(S, attention.kdim, 2)
    if kind == "memory" and attention.kdim == attention.vdim:
        return [q, k, k]
    return [q, k, one(S, attention.vdim, 3)]


def masks(kind: str, keys: int, batched: bool = True) -> dict[str, Any]:
    """What hides keys, by the names of the arguments."""
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 1]])
    padding = padding if batched else padding[1]
    causal = torch.ones(L, keys).triu(1).bool()
    heads = some(N * HEADS if batched else HEADS, L, keys, seed=5)
    return {
        "none": {},
        "keys": {"key_padding_mask": padding},
        "added to keys": {"key_padding_mask": some(*padding.shape, seed=6)},
        "pairs": {"attn_mask": causal},
        "added to pairs": {"attn_mask": some(L, keys, seed=4)},
        "of each head": {"attn_mask": heads},
        "both": {"key_padding_mask": padding, "attn_mask": causal},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and keys": {
            "key_padding_mask": padding,
            "attn_mask": causal,
            "is_causal": True,
        },
    }[kind]


MASKS = (
    *("none", "keys", "added to keys", "pairs", "added to pairs", "of each head", "both"),
    *("causal", "causal and keys"),
)
