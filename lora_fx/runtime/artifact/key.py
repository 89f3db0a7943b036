"""What compiled code depends on: where any of it is otherwise, the code is not used."""

import platform
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.graph.own_code import own_code
from lora_fx.plan.lock import lock_of
from lora_fx.runtime.artifact.model_code import model_code


def key_of(model: Any, spec: str, device: str) -> dict[str, str]:
    """Return the key of a compiled model by what each part of it says.

    `spec` is the text of its spec in one file, `device` the kind of device that it runs on.
    """
    return {
        "lora_fx": f"{version('lora_fx')} {own_code()}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "Python": platform.python_version(),
        "CPU": _cpu(),
        "device": _device(device),
        "spec": _hash(spec),
        "base model": _hash(repr((lock_of(model.lora_fx_plan).model, _tensors(model)))),
        "code of the model": model_code(model),
    }


def differences(key: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the parts in which two keys differ."""
    return sorted(part for part in {**key, **other} if key.get(part) != other.get(part))


def _tensors(model: nn.Module) -> list[tuple[str, str, str]]:
    return [
        (name, str(tuple(tensor.shape)), str(tensor.dtype))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]


def _cpu() -> str:
    """Describe what instructions the processor has; compiled code may use any of them."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        flags = next((one for one in lines if one.startswith(("flags", "Features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.system()} {platform.machine()} {capability} {_hash(flags)}"


def _device(kind: str) -> str:
    """Describe this machine's device of a kind."""
    if kind != "cuda":
        return kind
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} {major}.{minor}, CUDA {torch.version.cuda}"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
