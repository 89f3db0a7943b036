"""Read one adapter from a PEFT folder, whole or not at all."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.not_yet import unsupported_parts
from lora_fx.adapters.peft.kept_weights import with_weights
from lora_fx.adapters.peft.keys import PREFIX, adapted, embeddings, expected_tensors
from lora_fx.adapters.peft.plain import Origin, as_named, read_origins, with_origins
from lora_fx.adapters.peft.starts import (
    base_faults,
    header_faults,
    start_faults,
    with_starts,
)
from lora_fx.adapters.peft.write import CONFIG, TENSORS
from lora_fx.adapters.weights import copies
from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
from lora_fx.plan.modules import modules_of
from lora_fx.plan.offloaded import values_of
from lora_fx.plan.peft import from_peft, from_peft_as_named
from lora_fx.plan.rules import AdapterPlan, plan_adapter
from lora_fx.plan.trained import TrainedModule
from lora_fx.spec.peft.read import read_config

NOWHERE = Span(Source(TENSORS, ""), 0, 0)


@dataclass(frozen=True)
class Loaded:
    """An adapter folder's plan on a model, and its tensors by their names in the file."""

    plan: AdapterPlan
    tensors: Mapping[str, Tensor]


def read(folder: Path, name: str, model: nn.Module, layers: Sequence[int] | None) -> Loaded:
    """Return what a folder holds as the adapter `name` of a model, checked against it.

    `layers` are the old indices of the model's layers where they were repeated. Raises LoraFxError
    with every fault at once: unreadable files, settings that the language does not know or this
    version cannot do, missing, unexpected, misshapen or non-finite tensors. The model is only
    looked at.
    """
    config = dict(_config(folder))
    state, origins = _read_tensors(folder)
    faults = replication_faults(config, layers, folder)
    if faults:
        raise LoraFxError(faults)
    plan, state = _with_embeddings(_plan(folder, config, name, model, state), state, model)
    parts = unsupported_parts(plan)
    if parts:
        raise LoraFxError(_fault("adapter-unsupported", what, folder / CONFIG) for what in parts)
    expected = expected_tensors(as_named(plan), model)
    faults = [f for key, like in expected.items() for f in _tensor_faults(key, like, state, folder)]
    for key in sorted(state.keys() - expected.keys()):
        message = f"`{key}` belongs to nothing that the config names"
        faults.append(_fault("adapter-unexpected-tensor", message, folder / TENSORS))
    if faults:
        raise LoraFxError(faults)
    found = header_faults(plan, origins)
    whole = plan if found else with_origins(plan, origins)
    found = found or [*start_faults(plan), *base_faults(whole, origins, model)]
    if found:
        raise LoraFxError(_fault(code, message, folder / TENSORS) for code, message in found)
    state = with_weights(whole, with_starts(plan, state, model), folder, model)
    return Loaded(whole, state)


def layer_ranges(folder: Path) -> list[list[int]] | None:
    """Return the folder's `layer_replication`. Raises LoraFxError if there is no usable config."""
    return _config(folder).get("layer_replication")


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return read_config(folder).values
    except LoraFxError as error:
        below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        if not below or (folder / CONFIG).exists():
            raise
        names = ", ".join(f"`{name}`" for name in below)
        help = f"the folder has adapters below it: {names}"
        raise LoraFxError(replace(d, help=help) for d in error.diagnostics) from error


def _plan(
    folder: Path,
    config: dict[str, Any],
    name: str,
    model: nn.Module,
    state: Mapping[str, Tensor],
) -> AdapterPlan:
    """Plan the config on the model; what is wrong is said of the config, not of its translation."""
    by_name = config.get("target_modules") and _is_of_linears(state, model)
    translate = from_peft_as_named if by_name else from_peft
    found: list[Diagnostic] = []
    try:
        spec = translate(config | {"layer_replication": None}, model)
        named = replace(spec.adapters[0], name=name)
        plan = plan_adapter(named, modules_of(model), found, any_rank=True)
    except LoraFxError as error:
        found += error.diagnostics
        plan = None
    faults = [
        _fault(d.code, d.message + f" ({d.label})" * bool(d.label), folder / CONFIG)
        for d in found
        if d.severity == "error"
    ]
    if faults or plan is None:
        raise LoraFxError(faults)
    return plan


def _is_of_linears(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Whether every pair of matrices in a file is that of a linear layer of the model."""
    ending = ".lora_A.weight"
    names = [k.removeprefix(PREFIX).removesuffix(ending) for k in state if k.endswith(ending)]
    modules = storage.base_modules(model)
    return all(isinstance(modules.get(name), nn.Linear) for name in names)


def _with_embeddings(
    plan: AdapterPlan, state: Mapping[str, Tensor], model: nn.Module
) -> tuple[AdapterPlan, Mapping[str, Tensor]]:
    """Return plan and tensors with the embeddings that a file holds though no setting says so.

    Those that are the base's are left out; others become the adapter's own, not trained.
    """
    expected = expected_tensors(plan, model)
    left, own = dict(state), []
    for key, module in embeddings(model, adapted(plan, model)).items():
        if key in expected or key not in state:
            continue
        weight = values_of(module, "weight", copies.base_tensor(module, "weight"))  # type: ignore[arg-type]
        if weight.shape == state[key].shape and torch.equal(
            weight.cpu(), state[key].to(weight.dtype)
        ):
            del left[key]
        else:
            fqn = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
            own.append(TrainedModule(fqn, plan.name, weight.numel(), False, False, NOWHERE))
    return replace(plan, modules=(*plan.modules, *own)), left


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Origin]]:
    """Return the tensors of a folder, and of which weights the adapter was started."""
    path = folder / TENSORS
    pickled = folder / "adapter_model.bin"
    broken = OSError, ValueError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError
    try:
        if path.exists() or not pickled.exists():
            return _renamed(load_file(path)), read_origins(path)
        path = pickled
        state = torch.load(path, map_location="cpu", weights_only=True)
    except broken as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise _unreadable(path, "not a dictionary of tensors")
    return _renamed(state), {}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names that PEFT writes; it reads `lora_magnitude_vector.weight` too."""
    long = f"{storage.MAGNITUDE}.weight"
    return {k.removesuffix(".weight") if k.endswith(long) else k: t for k, t in state.items()}


def _unreadable(path: Path, error: object) -> LoraFxError:
    return LoraFxError((Diagnostic("adapter-unreadable", f"`{path}` cannot be read: {error}"),))


def replication_faults(
    config: Mapping[str, Any], layers: Sequence[int] | None, folder: Path
) -> list[Diagnostic]:
    """Return what is wrong if an adapter is for other repeated layers than the model has."""
    ranges = config.get("layer_replication")
    wanted = [i for start, end in ranges for i in range(start, end)] if ranges else None
    if wanted == (None if layers is None else list(layers)):
        return []
    repeat = ", ".join(f"{start}..{end}" for start, end in ranges or ())
    return [
        Diagnostic(
            "adapter-replication",
            f"the adapter is for layers {wanted or 'as they are'}, the model has "
            f"{(layers and list(layers)) or 'them as they are'}",
            notes=(f"in `{folder / CONFIG}`",),
            help=f"write `layers {{ replicate {repeat} }}` in the spec"
            if ranges
            else "compile a spec without `layers { replicate … }`",
        )
    ]


def _tensor_faults(
    key: str, like: Tensor, state: Mapping[str, Tensor], folder: Path
) -> list[Diagnostic]:
    path = folder / TENSORS
    if key not in state:
        return [_fault("adapter-missing-tensor", f"`{key}` is missing", path)]
    tensor = state[key]
    if tensor.shape != like.shape:
        message = f"`{key}` has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}"
        return [_fault("adapter-shape", message, path)]
    if tensor.is_floating_point() != like.is_floating_point():
        wanted = "floats" if like.is_floating_point() else "whole numbers"
        message = f"`{key}` holds {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}"
        return [_fault("adapter-dtype", message, path)]
    if not _is_finite(tensor):
        return [_fault("adapter-non-finite", f"`{key}` holds NaN or infinity", path)]
    return []


def _is_finite(tensor: Tensor) -> bool:
    known = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch orders no float8
    return not tensor.numel() or all(end.isfinite() for end in torch.aminmax(known))


def _fault(code: str, message: str, path: Path) -> Diagnostic:
    return Diagnostic(code, message, notes=(f"in `{path}`",))
