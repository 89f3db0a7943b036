"""A small model whose adapter waits for tokens, and what it computes, one sample at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.peft.keys import live_tensors
from tests.tiny import VOCABULARY, llama, tokens

SOUGHT = (7, 9)
SCALING = 5 / 3
WAITING = "variant = alora(tokens = [7, 9])"
PLACES = (8, 15, None)  # where the last invocation begins in each of `samples`


def invoked(
    adapter: str = "target linear",
    backend: str | None = None,
    unit: str = "layers",
    base: nn.Module | None = None,
) -> Any:
    """Return a compiled model; all tensors of its adapter are drawn anew, so that it acts."""
    text = f"""lora 1
    adapter default {{ rank = 3  alpha = 5  init = random  {WAITING}  {adapter} }}
    compile {{ unit = {unit} }}"""
    model: Any = lora_fx.compile(base or llama(2), text, backend=backend).eval()
    draw(model)
    return model


def draw(model: nn.Module, name: str = "default", seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in live_tensors(model, name).values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)


def samples(length: int = 17) -> Tensor:
    """Three samples: invoked twice, at the very end, and by half of the tokens only."""
    ids = tokens(3, length)
    ids[(ids == SOUGHT[0]) | (ids == SOUGHT[1])] = VOCABULARY - 1
    sought = torch.tensor(SOUGHT)
    ids[0, 3:5] = ids[0, 8:10] = ids[1, length - 2 :] = sought
    ids[2, 4], ids[2, 9] = sought
    return ids


@contextmanager
def adapted(
    base: nn.Module,
    model: nn.Module,
    starts: Mapping[int, int | None],
    name: str = "default",
    times: float = 1.0,
) -> Iterator[None]:
    """Let plain modules add 5/3 B A x, so many times, to all tokens from a start on, row by row.

    There must be no cache.
    """
    live = live_tensors(model, name)

    def add(fqn: str, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        A, B = (live[f"{fqn}.lora_{part}.weight"].to(y.dtype) for part in "AB")
        bias = live.get(f"{fqn}.lora_B.bias")
        x, rows = args[0], []
        for row, start in zip(range(len(y)), [starts[i] for i in range(len(y))], strict=True):
            if start is None:
                rows.append(y[row])
                continue
            start = min(start, y.shape[1])
            after = F.linear(F.linear(x[row, start:], A), B, None if bias is None else bias.to(y))
            rows.append(torch.cat([y[row, :start], y[row, start:] + times * SCALING * after]))
        return torch.stack(rows)

    fqns = {key.rpartition(".lora_")[0] for key in live}
    hooks = [
        base.get_submodule(fqn).register_forward_hook(lambda m, a, y, f=fqn: add(f, m, a, y))
        for fqn in fqns
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
