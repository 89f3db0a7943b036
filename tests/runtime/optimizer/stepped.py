"""What parameters are after some steps, by our names, on either side."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lora_fx
from tests.by_peft import PREFIX, by_peft
from tests.tiny import llama, tokens

STEPS = 3


def ours(text: str) -> nn.Module:
    return lora_fx.compile(llama(2), text, backend=None)


def theirs(text: str) -> nn.Module:
    return by_peft(ours(text), llama(2))


def stepped(model: nn.Module, make: Callable[[nn.Module], Optimizer]) -> dict[str, Tensor]:
    """What each parameter changed by that is trained, after some steps."""
    optimizer = make(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        changes = {name: parameters[name] - value for name, value in before.items()}
    return {_named(name): change for name, change in changes.items()}


def _named(name: str) -> str:
    """Our name of a parameter; PEFT's embeddings hold theirs without a module."""
    name = name.removeprefix(PREFIX).replace(".base_layer", "")
    return name if name.endswith(".weight") else f"{name}.weight"
