"""Adapters that say where their weights are and not what they adapt: their own config does."""

import dataclasses
from pathlib import Path

from torch import nn

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source
from lora_fx.plan.hub import is_hub_id, out_of_reach
from lora_fx.plan.peft import peft_text
from lora_fx.spec import parse
from lora_fx.spec.evaluate import evaluate, no_environment
from lora_fx.spec.spec import AdapterSpec, Setting

_CONFIG = "adapter_config.json"


def with_own_targets(adapter: AdapterSpec, tree: nn.Module) -> AdapterSpec:
    """Return the adapter; without any target, with what its `adapter_config.json` says.

    What the spec sets itself stays. Raises LoraFxError if there is no such config, or one that the
    language cannot say.
    """
    setting = adapter.settings.get("weights")
    if setting is None or adapter.targets or adapter.trains or adapter.tokens:
        return adapter
    folder = weights_folder(setting)
    try:
        name = f"{folder / _CONFIG} as .lora"
        (own,) = parse(Source(name, peft_text(folder, tree))).adapters
    except LoraFxError as error:
        found = [
            d if d.span else dataclasses.replace(d, span=setting.span) for d in error.diagnostics
        ]
        raise LoraFxError(found) from error
    return dataclasses.replace(
        own, name=adapter.name, settings={**own.settings, **adapter.settings}
    )


def weights_folder(setting: Setting) -> Path:
    """Return the folder that `weights` names: relative to its file, or that of a hub id.

    Of a hub id only the config is fetched. Raises LoraFxError if there is neither.
    """
    named = str(evaluate(setting.value, no_environment))
    beside = Path(setting.span.source.name).parent / named
    if beside.exists():
        return beside
    label = f"`{beside}` does not exist"
    if "/" not in named or not is_hub_id(named):
        message = f"there is no folder `{named}`"
        raise LoraFxError((Diagnostic("no-adapter", message, setting.span, label),))
    from huggingface_hub import hf_hub_download

    away = out_of_reach(named, _CONFIG)
    try:
        return Path(hf_hub_download(named, _CONFIG, local_files_only=away is not None)).parent
    except (OSError, ValueError) as error:
        reason = away or (str(error).splitlines() or [type(error).__name__])[0]
        message = f"`{named}` is neither a folder nor a hub id"
        if away is not None:
            message = f"`{named}` is no folder, not in the cache, and the hub does not answer"
        diagnostic = Diagnostic("no-adapter", message, setting.span, label, notes=(reason,))
        raise LoraFxError((diagnostic,)) from error
