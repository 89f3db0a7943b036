"""A model whose weights are mapped from its checkpoint: what nobody reads takes no memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.hub import is_hub_id, out_of_reach
from lora_fx.plan.skeleton import tree_of
from lora_fx.runtime.artifact.base import Place
from lora_fx.runtime.streamed.shards import Shard, shards_in
from lora_fx.runtime.streamed.stored_names import Part, stored_parts
from lora_fx.spec.spec import Spec


@dataclass(frozen=True)
class MappedModel:
    """A model, the files of the checkpoint that it is mapped from, and what these hold of it.

    `parts` says of each tensor in the files which part of the model's it is.
    """

    tree: nn.Module
    shards: Sequence[Shard]
    parts: Mapping[str, Part]


def map_model(place: Place | None, spec: Spec) -> MappedModel:
    """Build a model over its checkpoint's own memory. Raises LoraFxError if there is none."""
    if place is None:
        message, help = "the spec names no model, and none is given", 'write `model "path or id"`'
        raise LoraFxError((Diagnostic("no-model", message, help=f"{help}, or pass one"),))
    tree = tree_of(place["path"], spec)
    folder = _folder(place)
    try:
        shards = tuple(shards_in(folder))
        parts = stored_parts(tree, (name for shard in shards for name in shard.tensors))
        _fill(tree, shards, parts)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"`{folder}` has no safetensors checkpoint that can be read"
        raise LoraFxError((Diagnostic("no-model", message, notes=(reason,)),)) from error
    return MappedModel(tree, shards, parts)


def _folder(place: Place) -> Path:
    path = Path(place["path"])
    if path.exists() or not is_hub_id(place["path"]):
        return path if path.is_dir() else path.parent
    from huggingface_hub import snapshot_download

    away = out_of_reach(place["path"], "config.json", place["revision"])
    options = {"revision": place["revision"], "local_files_only": away is not None}
    return Path(snapshot_download(place["path"], **options))


def _fill(tree: nn.Module, shards: Sequence[Shard], parts: Mapping[str, Part]) -> None:
    """Give every parameter and buffer that is in the files its values there; ties stay ties.

    One that is there in pieces is NaN, and takes no memory: nothing is to be computed from it.
    """
    parameters = dict(tree.named_parameters(remove_duplicate=False))
    mapped: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard.path, "pt") as file:
            for name in parts.keys() & shard.tensors.keys():
                fqn, whole = parts[name].fqn, parts[name].whole
                if whole:
                    mapped[fqn] = file.get_tensor(name)
                elif fqn in parameters and shard.tensors[name].floating is not None:
                    nothing = torch.tensor(torch.nan, dtype=shard.tensors[name].floating)
                    mapped[fqn] = nothing.expand(parameters[fqn].shape)
    made = {
        id(parameter): nn.Parameter(mapped[name], requires_grad=False)
        for name, parameter in parameters.items()
        if name in mapped and mapped[name].is_floating_point()
    }
    for fqn, module in tree.named_modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = made.get(id(parameter), parameter)
        for name in module._buffers:
            own = f"{fqn}.{name}".lstrip(".")
            module._buffers[name] = mapped.get(own, module._buffers[name])
