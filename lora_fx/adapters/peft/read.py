"""Read one adapter from a PEFT folder, whole or not at all."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.peft import config as peft_config
from lora_fx.adapters.peft.write import CONFIG, PREFIX, TENSORS
from lora_fx.adapters.site import Arithmetic
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.peft.config_faults import malformed
from lora_fx.spec.peft.matching import targets

_NAMES = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class LoadedSite:
    """One module's share of an adapter file: float32 A (r, in), B (out, r)."""

    tensors: Mapping[str, Tensor]
    arithmetic: Arithmetic


def read(
    folder: Path, model: nn.Module, layer_map: list[int] | None, linears: frozenset[str]
) -> dict[str, LoadedSite]:
    """Return what the folder holds for each module of `model`, checked against it.

    `layer_map` is the old index of each of the model's layers where it was replicated; `linears`
    are its linear layers but the output head. Raises LoraFxError with every fault at once:
    unreadable files, settings of other methods, missing, unexpected, misshapen or non-finite
    tensors. The model is only looked at.
    """
    config = read_config(folder)
    state = _read_tensors(folder)
    faults = [
        _fault("adapter-unsupported", f"`{setting}` is not supported yet", folder / CONFIG)
        for setting in peft_config.unsupported(config)
    ]
    misplaced = _replication_faults(config, layer_map, folder)
    if misplaced:
        raise LoraFxError((*faults, *misplaced))
    modules = storage.base_modules(model)
    wanted = _wanted(config, state, modules, linears)
    for fqn in sorted(wanted):
        faults += _module_faults(fqn, modules.get(fqn), config, state, folder)
    known = {f"{PREFIX}{fqn}.{name}" for fqn in wanted for name in _NAMES}
    for key in sorted(set(state) - known):
        faults.append(
            _fault("adapter-unexpected-tensor", f"`{key}` belongs to no target", folder / TENSORS)
        )
    if not wanted:
        faults.append(
            _fault("adapter-empty", "the adapter targets no module of this model", folder)
        )
    if faults:
        raise LoraFxError(tuple(faults))
    return {fqn: _loaded(fqn, config, state) for fqn in modules if fqn in wanted}


def _loaded(fqn: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> LoadedSite:
    tensors = {name: state[f"{PREFIX}{fqn}.{name}"].float() for name in _NAMES}
    return LoadedSite(tensors, peft_config.arithmetic(config, fqn))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's `adapter_config.json`. Raises LoraFxError for values of wrong types."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LoraFxError((_unreadable(path, error, folder),)) from error
    if not isinstance(config, dict):
        raise LoraFxError((_unreadable(path, "not a JSON object", folder),))
    faults = malformed(config)
    if faults:
        raise LoraFxError(tuple(_fault("adapter-config", f.message, path) for f in faults))
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    pickled = folder / "adapter_model.bin"
    try:
        if path.exists() or not pickled.exists():
            return load_file(path)
        path = pickled
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise LoraFxError((_unreadable(path, error, folder),)) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise LoraFxError((_unreadable(path, "not a dictionary of tensors", folder),))
    return state


def _unreadable(path: Path, error: object, folder: Path) -> Diagnostic:
    below = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    where = f"the folder has adapters below it: {', '.join(f'`{name}`' for name in below)}"
    return Diagnostic(
        "adapter-unreadable",
        f"`{path}` cannot be read: {error}",
        None,
        help=where if below else None,
    )


def _replication_faults(
    config: Mapping[str, Any], layer_map: list[int] | None, folder: Path
) -> list[Diagnostic]:
    wanted = peft_config.replication(config)
    if wanted == layer_map:
        return []
    ranges = config.get("layer_replication")
    return [
        Diagnostic(
            "adapter-replication",
            f"the adapter is for layers {wanted or 'as they are'}, the model has "
            f"{layer_map or 'them as they are'}",
            None,
            notes=(f"in `{folder / CONFIG}`",),
            help="write `layers { replicate "
            + ", ".join(f"{a}..{b}" for a, b in ranges)
            + " }` in the spec"
            if ranges
            else "compile a spec without `layers { replicate … }`",
        )
    ]


def _wanted(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    linears: frozenset[str],
) -> set[str]:
    """Return the config's targets, or without any the modules that the tensors name."""
    if config.get("target_modules"):
        return targets(config, modules, linears)
    return {
        key.removeprefix(PREFIX).rsplit(".lora_", 1)[0]
        for key in state
        if key.startswith(PREFIX) and ".lora_" in key
    }


def _module_faults(
    fqn: str,
    module: nn.Module | None,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    folder: Path,
) -> list[Diagnostic]:
    if module is None:
        return [_fault("adapter-unexpected-tensor", f"the model has no module `{fqn}`", folder)]
    if not isinstance(module, nn.Linear):
        kind = type(module).__name__
        message = f"`{fqn}` is of class `{kind}`; only linear layers can be loaded yet"
        return [_fault("adapter-unsupported", message, folder / CONFIG)]
    r = peft_config.rank(config, fqn)
    shapes = {_NAMES[0]: (r, module.in_features), _NAMES[1]: (module.out_features, r)}
    return [
        fault
        for name, shape in shapes.items()
        for fault in _tensor_faults(f"{PREFIX}{fqn}.{name}", shape, state, folder)
    ]


def _tensor_faults(
    key: str, shape: tuple[int, int], state: Mapping[str, Tensor], folder: Path
) -> list[Diagnostic]:
    path = folder / TENSORS
    if key not in state:
        return [_fault("adapter-missing-tensor", f"`{key}` is missing", path)]
    tensor = state[key]
    if tuple(tensor.shape) != shape:
        message = f"`{key}` has shape {tuple(tensor.shape)}, expected {shape}"
        return [_fault("adapter-shape", message, path)]
    if not tensor.is_floating_point():
        message = f"`{key}` holds {str(tensor.dtype).removeprefix('torch.')}, expected floats"
        return [_fault("adapter-dtype", message, path)]
    if not torch.isfinite(tensor.float()).all():
        return [_fault("adapter-non-finite", f"`{key}` holds NaN or infinity", path)]
    return []


def _fault(code: str, message: str, path: Path) -> Diagnostic:
    return Diagnostic(code, message, None, notes=(f"in `{path}`",))
