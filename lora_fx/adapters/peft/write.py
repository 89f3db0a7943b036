"""Write one adapter as a PEFT folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from lora_fx.adapters import storage
from lora_fx.adapters.peft.card import write_card
from lora_fx.adapters.peft.kept_weights import write_weights
from lora_fx.adapters.peft.keys import adapted, embeddings
from lora_fx.adapters.peft.plain import header, plain
from lora_fx.adapters.weights import copies
from lora_fx.adapters.weights.changed_weight import changed_by
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.offloaded import values_of
from lora_fx.plan.rules import AdapterPlan
from lora_fx.plan.to_peft import config_of
from lora_fx.spec.expressions import Word

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def write(
    folder: Path,
    model: nn.Module,
    plan: AdapterPlan,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    save_embedding_layers: bool | Literal["auto"],
    earlier: Path,
) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and a card into a folder.

    `tensors` are the adapter's own by their names in the file.

    The card has the text of the one in `earlier`, if there is one.

    With `save_embedding_layers` the weights of the input and output embeddings are written too,
    with `auto` of those of them that the adapter adapts, as PEFT does; but none that an adapter has
    changed: what is read has to be the base's.
    """
    if save_embedding_layers:
        ends = embeddings(model, adapted(plan, model))
        if save_embedding_layers == "auto":
            ends = {name: module for name, module in ends.items() if ".base_layer." in name}
        ends = {name: module for name, module in ends.items() if not changed_by(module)}
        weights = {n: values_of(m, "weight", _of_base(m)).clone() for n, m in ends.items()}
        tensors = weights | dict(tensors)
    tensors = _each_its_own(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"} | header(model, plan))
    write_weights(folder, model, plan.name)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    write_card(folder, config, earlier)


def _of_base(module: nn.Module) -> Tensor:
    weight = copies.base_tensor(module, "weight")
    assert weight is not None
    return weight


def _each_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values, none twice in memory: a tied layer's are written for both."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def folder_config(
    model: nn.Module, plan: AdapterPlan, layers: Sequence[int] | None
) -> dict[str, Any]:
    """Return the `LoraConfig` fields that give each site the rank and scaling it has now.

    Ranks and scalings that differ by module go into `rank_pattern` and `alpha_pattern`. Dropout
    that differs by module cannot be said there; the largest is written. Raises LoraFxError for
    what PEFT has no names for.
    """
    placed = dict(storage.sites(model))
    current = (placed[site.name].lora_arithmetic[plan.name] for site in plan.sites)
    sites = tuple(
        replace(site, alpha=a.alpha, scaling=a.scaling, rslora=a.rslora, dropout=a.dropout)
        for site, a in zip(plain(plan).sites, current, strict=True)
    )
    init = _init(plan)
    sites = tuple(replace(site, init=init) for site in sites)
    config = config_of(replace(plan, sites=sites), list(storage.base_modules(model)), layers)
    transposed = any(site.layer.kind == "transposed" for site in plan.sites)
    return config | {"fan_in_fan_out": transposed, "inference_mode": True}


def _init(plan: AdapterPlan) -> Word:
    """Return the init that a config says: one that is in force when the adapter is there.

    It keeps B from being trained, or puts another weight in place. Raises LoraFxError if it does so
    at some modules only, for PEFT has one for all.
    """
    inits = dict.fromkeys(site.init for site in plan.sites)
    if len(inits) == 1 and next(iter(inits)).name in ("mica", "loftq"):
        return next(iter(inits))
    for site in plan.sites:
        if site.init.name == "loftq":
            message = f"PEFT has one `init` for the whole adapter `{plan.name}`"
            label = f"`{site.init.name}` at `{site.name}`, and another elsewhere"
            span = site.settings["init"].span if "init" in site.settings else site.rule
            raise LoraFxError((Diagnostic("peft-cannot-say", message, span, label),))
    return Word("default")
