"""Refuse what would keep adapters from taking part: replaced forwards, and hooks in their way."""

from collections.abc import Collection, Iterable, Iterator

from torch import nn

from lora_fx.adapters.dynamic_class import has_forward_of_its_own
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.alike import once_each
from lora_fx.plan.offloaded import hooks_of, offload_hook
from lora_fx.plan.rules import AdapterPlan


def require_reachable(tree: nn.Module, adapters: Iterable[AdapterPlan]) -> None:
    """Raise LoraFxError if a module of the plans would run without what is put into it."""
    plans = list(adapters)
    called = [part.fqn for plan in plans for part in (*plan.sites, *plan.tokens)]
    biases = [bias.name.rpartition(".")[0] for plan in plans for bias in plan.biases]
    trained = [module.fqn for plan in plans for module in plan.modules]
    faults = [fault for fqn in called for fault in _replaced(tree, fqn)]
    faults += [fault for fqn in (*called, *biases, *trained) for fault in _preloaded(tree, fqn)]
    if faults:
        raise LoraFxError(once_each(faults))


def require_compilable(tree: nn.Module, units: Collection[str]) -> None:
    """Raise LoraFxError if units, the modules that are compiled, cannot be compiled with hooks.

    A unit is a layer, or "" for the whole tree.
    """
    faults = [
        fault
        for fqn in units
        for fault in (*_replaced(tree, fqn), *_hooks_inside(tree.get_submodule(fqn), fqn))
    ]
    if faults:
        raise LoraFxError(once_each(faults))


def _replaced(tree: nn.Module, fqn: str) -> Iterator[Diagnostic]:
    if has_forward_of_its_own(tree.get_submodule(fqn)):
        message = f"{_name(fqn)} has a `forward` of its own, which replaced that of its class"
        help = "compile the model first, and replace the `forward` afterwards"
        yield Diagnostic("replaced-forward", message, help=help)


def _preloaded(tree: nn.Module, fqn: str) -> Iterator[Diagnostic]:
    parts = fqn.split(".")
    for count in range(len(parts) + 1):
        name = ".".join(parts[:count])
        hook = offload_hook(tree.get_submodule(name))
        if hook is not None and hook.place_submodules:
            message = f"{_name(name)} brings in all weights inside it, and has none of adapters"
            help = "dispatch the model without `preload_module_classes`"
            yield Diagnostic("hook-in-the-way", message, help=help)


def _hooks_inside(unit: nn.Module, fqn: str) -> Iterator[Diagnostic]:
    inside = [module for module in unit.modules() if module is not unit]
    hooks = [hook for module in inside for hook in hooks_of(module)]
    if not hooks:
        return
    from accelerate.hooks import AlignDevicesHook

    help = "compile with `backend=None`"
    aligning = [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]
    others = (type(hook).__name__ for hook in hooks if hook not in aligning)
    for other in dict.fromkeys(others):
        message = f"{_name(fqn)} cannot be compiled with a `{other}` inside"
        yield Diagnostic("hook-in-the-way", message, help=help)
    placed = (hook.execution_device for hook in aligning)
    devices = dict.fromkeys(str(device) for device in placed if device is not None)
    if len(devices) > 1:
        message = f"{_name(fqn)} cannot be compiled: it runs on the devices {', '.join(devices)}"
        yield Diagnostic("hook-in-the-way", message, help=f"place it on one device, or {help}")
    if not fqn and any(hook.offload for hook in aligning):
        message = "all offloaded weights would come in at once to run the model as one graph"
        yield Diagnostic("hook-in-the-way", message, help=f"write `unit = layers`, or {help}")


def _name(fqn: str) -> str:
    return f"`{fqn}`" if fqn else "the model"
