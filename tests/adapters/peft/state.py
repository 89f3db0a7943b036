"""Everything about a model that loading could change."""

from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Names, identities, data, flags, modes and classes, and the adapters by name."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    own = vars(model)
    return (
        {n: (id(t), t.data_ptr(), t.requires_grad, t.detach().clone()) for n, t in tensors}
        | {f"{n}:": (id(m), type(m), m.training) for n, m in model.named_modules()}
        | {name: (own[name],) for name in own if name.startswith("lora_fx_")}
        | {f"{n}: own": (sorted(vars(m)),) for n, m in model.named_modules()}
    )


def assert_same(after: dict[str, Any], before: dict[str, Any]) -> None:
    assert after.keys() == before.keys()
    for name, values in before.items():
        for a, b in zip(after[name], values, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name
