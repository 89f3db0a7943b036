"""The module tree to plan on: a model's own, or one built on meta from its config."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.spec import ModelRef

ModelLike = nn.Module | PretrainedConfig | str | Path


def tree_of(model: ModelLike, ref: ModelRef | None = None) -> nn.Module:
    """Return a module tree that may be changed: layers may be replicated in it.

    A live model's parameters are shared with it and never written. A config, a folder, a
    `config.json` or a hub id is built on the meta device. `ref` is the spec's `model` statement.
    """
    if isinstance(model, nn.Module):
        return _skeleton(model)
    config = model if isinstance(model, PretrainedConfig) else read_config(model, ref)
    return build_on_meta(config, ref)


def build_on_meta(config: PretrainedConfig, ref: ModelRef | None = None) -> nn.Module:
    """Build the model that a config describes, without weights."""
    names = getattr(config, "architectures", None) or [None]
    cls = getattr(transformers, names[0] or "", None)
    wanted = ref.dtype if ref is not None and ref.dtype else None
    dtype = getattr(torch, wanted) if wanted else getattr(config, "dtype", None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device("meta"):
            return cls(config) if cls is not None else AutoModel.from_config(config)
    finally:
        torch.set_default_dtype(before)


def read_config(model: str | Path, ref: ModelRef | None = None) -> PretrainedConfig:
    """Read the config of a folder, a `config.json` or a hub id."""
    options: dict[str, Any] = {}
    if ref is not None and str(model) == ref.path:
        options = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(model, **{k: v for k, v in options.items() if v})
    except (OSError, ValueError, json.JSONDecodeError) as error:
        message = f"`{model}` names no model: {str(error).splitlines()[0]}"
        span = ref.span if ref is not None and str(model) == ref.path else None
        help = "give a folder, a `config.json` or a hub id"
        raise LoraFxError((Diagnostic("no-model", message, span, help=help),)) from error


def _skeleton(model: nn.Module) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
