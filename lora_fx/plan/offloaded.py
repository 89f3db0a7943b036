"""Modules that accelerate places: their weights may come in when they run, and go afterwards.

Such a module carries a hook, and its `forward` is wrapped. While it does not run, weights that are
offloaded are on meta; the hook's store has their values, on the CPU or on a disk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def hooks_of(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks of a module, one by one."""
    return _flat(vars(module)["_hf_hook"]) if "_hf_hook" in vars(module) else []


def offload_hook(module: nn.Module) -> Any | None:
    """Return the hook that brings in a module's weights, None if they stay where they are."""
    return next((hook for hook in hooks_of(module) if getattr(hook, "offload", False)), None)


def weight_stores(tree: nn.Module) -> list[Any]:
    """Return what holds offloaded weights; a copy of the modules shares it."""
    hooks = (hook for module in tree.modules() for hook in hooks_of(module))
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    return [getattr(found, "dataset", found) for found in maps if found is not None]


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Return where a tensor of a module is when the module runs."""
    hook = offload_hook(module)
    return tensor.device if hook is None else torch.device(hook.execution_device)


def values_of(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the values of `tensor`, the module's own under a name, wherever they are."""
    hook = offload_hook(module)
    if tensor.device.type != "meta" or hook is None:
        return tensor.detach()
    return hook.weights_map[name].detach().to(tensor.dtype)


def distinct_parameters(tree: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter once; tied ones are known by their names where they are offloaded."""
    tied = tied_names(tree)
    for name, parameter in tree.named_parameters():
        if parameter.device.type != "meta" or tied.get(name, name) == name:
            yield parameter


def tied_names(tree: nn.Module) -> dict[str, str]:
    """Return by name which parameter each tied one is, itself or another, in an offloaded model.

    Identity does not tell there: accelerate gives each module a meta tensor of its own. So this is
    what the model itself says; in other models nothing.
    """
    if not any(offload_hook(module) for module in tree.modules()):
        return {}
    ties: dict[str, str] = getattr(tree, "all_tied_weights_keys", {})
    return {**ties, **{source: source for source in ties.values()}}


def _flat(hook: Any) -> list[Any]:
    return [one for part in hook.hooks for one in _flat(part)] if hasattr(hook, "hooks") else [hook]
