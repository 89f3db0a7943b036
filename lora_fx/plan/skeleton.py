"""The module tree to plan on: a model's own, or one built on meta from its config."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.hub import is_hub_id, out_of_reach
from lora_fx.plan.offloaded import weight_stores
from lora_fx.spec.spec import ModelRef, Spec

ModelLike = nn.Module | PretrainedConfig | str | Path


def tree_of(model: ModelLike | None, spec: Spec) -> nn.Module:
    """Return the module tree of a live model, or build that of a config on the meta device.

    `model` is a live model, a config, a folder, a `config.json` or a hub id; None is the model
    that the spec names. Raises LoraFxError if there is none.
    """
    if isinstance(model, nn.Module):
        return model
    ref = spec.model
    if isinstance(model, PretrainedConfig):
        return build_on_meta(model, ref)
    if model is not None:
        own = ref if ref is not None and str(model) == ref.path else None
        return build_on_meta(read_config(model, own), ref)
    if ref is None:
        message = "the spec names no model, and none is given"
        help = 'write `model "path or id"`, or pass one'
        raise LoraFxError((Diagnostic("no-model", message, help=help),))
    beside = Path(ref.span.source.name).parent / ref.path
    return build_on_meta(read_config(beside if beside.exists() else ref.path, ref), ref)


def structure_of(tree: nn.Module) -> nn.Module:
    """Return a copy of the modules on the same weights, free to be restructured."""
    tensors = (*tree.parameters(), *tree.buffers())
    states = (getattr(tensor, "quant_state", None) for tensor in tensors)
    kept = (*tensors, *states, *weight_stores(tree))
    return copy.deepcopy(tree, {id(shared): shared for shared in kept})


def build_on_meta(config: PretrainedConfig, ref: ModelRef | None = None) -> nn.Module:
    """Build the model that a config describes, without weights; `ref` may say in which dtype.

    Of the class that the config names, else a causal language model if there is one of its kind.
    """
    wanted = ref.dtype if ref is not None and ref.dtype not in (None, "auto") else None
    dtype = getattr(torch, wanted) if wanted else getattr(config, "dtype", None)
    trust = ref is not None and ref.trust_remote_code
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device("meta"):
            return _construct(copy.deepcopy(config), trust)
    except (ImportError, OSError, ValueError) as error:
        raise _no_model(f"a `{type(config).__name__}` cannot be built", ref, error) from error
    finally:
        torch.set_default_dtype(before)


def _construct(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if named is not None:
            return named(config)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if causal else AutoModel
    return auto.from_config(config, trust_remote_code=trust_remote_code)


def read_config(model: str | Path, ref: ModelRef | None = None) -> PretrainedConfig:
    """Read the config of a folder, a `config.json` or a hub id; `ref` may say which revision.

    Raises LoraFxError if there is none.
    """
    options: dict[str, Any] = {"trust_remote_code": ref is not None and ref.trust_remote_code}
    if ref is not None and ref.revision is not None:
        options["revision"] = ref.revision
    reason = None
    if not Path(model).exists():
        if not is_hub_id(str(model)):
            missing = FileNotFoundError("it is no hub id, and there is no such folder or file")
            raise _no_model(f"`{model}` does not exist", ref, missing)
        reason = out_of_reach(str(model), "config.json", options.get("revision"))
        options["local_files_only"] = reason is not None
    try:
        return AutoConfig.from_pretrained(str(model), **options)
    except (ImportError, OSError, ValueError, KeyError) as error:
        if reason is not None:
            message = f"`{model}` is no folder, not in the cache, and the hub does not answer"
            raise _no_model(message, ref, ConnectionError(reason)) from error
        raise _no_model(f"`{model}` has no config that can be read", ref, error) from error


def _no_model(message: str, ref: ModelRef | None, error: Exception) -> LoraFxError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    span = ref.span if ref is not None else None
    help = "give a folder, a `config.json` or a hub id"
    return LoraFxError((Diagnostic("no-model", message, span, notes=(reason,), help=help),))
