"""Adapters that no sample of a step had: they have no gradient, and the optimizer leaves them.

In the graph of a mixed batch their gradients are zeros, and AdamW moves a parameter on a zero
gradient too. Which adapters a backward pass is of is noted when it begins, and before an optimizer
steps, or after the closure that it is given, those of which there was no sample since their
gradients were last cleared lose theirs. Cleared is what is gone, or was written to since a step.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lora_fx.adapters.result_tensors import result_tensors
from lora_fx.adapters.storage import owner_of

_installed: list[Any] = []
_models: "weakref.WeakSet[Any]" = weakref.WeakSet()
Stepped = dict[int, int]  # writes to gradients when an optimizer stepped, by their parameters' ids


def note_present(model: Any, result: Any, adapters: set[str]) -> None:
    """Note, once a backward pass through a result begins, that samples of these adapters were.

    Forgotten are adapters of earlier passes whose gradients have been cleared since.
    """
    _before_every_step()
    _models.add(model)
    seen, before = weakref.ref(model), dict(model.lora_fx_present or {})

    def begins(_: Tensor) -> None:
        model = seen()
        if model is None:
            return
        noted = model.lora_fx_present or {}
        cleared = {
            name
            for name, note in before.items()
            if noted.get(name) is note and _is_cleared(model, name, note)
        }
        kept = {name: note for name, note in noted.items() if name not in cleared}
        model.lora_fx_present = kept | {name: {} for name in adapters}

    for tensor in result_tensors(result):
        if tensor.requires_grad:
            tensor.register_hook(begins)


def _before_every_step() -> None:
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Clear what is absent, or have a closure do it, which computes the gradients."""
    place = next((i for i, one in enumerate(args) if callable(one) and one is not optimizer), None)
    given = kwargs.get("closure") if place is None else args[place]
    if given is None:
        _clear_absent(optimizer)
        return None

    def closure() -> Any:
        loss = given()
        _clear_absent(optimizer)
        return loss

    if place is None:
        return args, {**kwargs, "closure": closure}
    return (*args[:place], closure, *args[place + 1 :]), kwargs


def _clear_absent(optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in (one for one in list(_models) if one.lora_fx_present is not None):
        absent = [name for name in model.lora_fx_adapters if name not in model.lora_fx_present]
        for parameter in _parameters(model, absent):
            if id(parameter) in held:
                parameter.grad = None
        for name, stepped in model.lora_fx_present.items():
            there = ((id(p), p.grad) for p in _parameters(model, [name]))
            stepped |= {i: grad._version for i, grad in there if grad is not None and i in held}
        every = _parameters(model, model.lora_fx_adapters)
        if all(id(parameter) in held for parameter in every if parameter.grad is not None):
            model.lora_fx_present = None


def _is_cleared(model: Any, adapter: str, stepped: Stepped) -> bool:
    """Whether each gradient of an adapter is gone, or set to zero since an optimizer stepped."""
    there = ((id(p), p.grad) for p in _parameters(model, [adapter]))
    return all(grad is None or stepped.get(i, grad._version) != grad._version for i, grad in there)


def _parameters(model: Any, adapters: Iterable[str]) -> Iterator[nn.Parameter]:
    """Yield the parameters that these adapters own."""
    if model.lora_fx_owned is None:
        model.lora_fx_owned = _owned(model)
    for name in adapters:
        for module in model.lora_fx_owned.get(name, ()):
            yield from (p for p in module._parameters.values() if p is not None)


def _owned(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules with parameters that each adapter owns."""
    found: dict[str, list[nn.Module]] = defaultdict(list)
    for fqn, module in model.named_modules():
        owner = owner_of(fqn) if module._parameters else None
        if owner is not None:
            found[owner].append(module)
    return dict(found)
