"""What PEFT wrote of an adapter over a changed base, as plain LoRA over the original one.

    A' = [A; A₀], B' = [B, −B₀], r' = 2r, s' = s        s' B' A' = s (B A − B₀ A₀)

A₀ and B₀ are in the folder that PEFT wrote before training. Of layers that their init left alone B₀
A₀ is zero. A convolution's factors are joined group by group. The changed weights of embeddings and
heads, which PEFT wrote as well, are left out: the original ones are meant. Everything else stays:
copies, magnitudes, which are of the same matrix, biases, rows. (PEFT's own conversion, which saves
with `path_initial_model_for_weight_conversion`, keeps lora_A and lora_B alone.)
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_fx.adapters.peft.write import CONFIG, TENSORS
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.spec.peft.read import read_config
from lora_fx.spec.together import together

_OF_RANK = ("target_parameters", "kasa_config", "monteclora_config", "use_bdlora")
_CHANGED = ".base_layer.weight"  # of an adapted embedding or head, without B₀ A₀
_PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


def subtract_mutated_init(folder: str | Path, initial: str | Path, out: str | Path) -> None:
    """Write a PEFT folder whose adapter does to the original base what `folder` does to its own.

    `initial` is the adapter before training. Ranks are doubled, scalings stay, rsLoRA's and those
    of patterns too. The folder appears when it is whole. Raises LoraFxError if the two folders are
    not of one adapter, or of one whose init took no B₀ A₀ out of the base, or of parameters or a
    variant that is not of twice the rank by rows alone.
    """
    config = dict(read_config(Path(folder)).values)
    faults = list(_unlike(config, read_config(Path(initial)).values))
    if faults:
        raise LoraFxError(faults)
    trained, start = load_file(Path(folder) / TENSORS), load_file(Path(initial) / TENSORS)
    faults = list(_faults(trained, start))
    if faults:
        raise LoraFxError(faults)
    joined = {key: value for key, value in trained.items() if not key.endswith(_CHANGED)}
    for first in (key for key in trained if key.endswith(tuple(_PAIRS))):
        ending = next(one for one in _PAIRS if first.endswith(one))
        second = first.removesuffix(ending) + _PAIRS[ending]
        own, began = (trained[first], trained[second]), (start[first], start[second])
        joined[first], joined[second] = _joined(own, began)
    with together(Path(out)) as beside:
        save_file(joined, beside / TENSORS, metadata={"format": "pt"})
        text = json.dumps(_doubled(config), indent=2, sort_keys=True)
        (beside / CONFIG).write_text(text, encoding="utf-8")


def _joined(own: tuple[Tensor, Tensor], began: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (A, B), (A0, B0) = own, began
    groups = len(A) // B.shape[1]
    rows = zip(A.chunk(groups), A0.chunk(groups), strict=True)
    return torch.cat([part for pair in rows for part in pair]), torch.cat([B, -B0], 1)


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return {
        **config,
        "init_lora_weights": True,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in ranks.items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in alphas.items()},
        **dict.fromkeys(("corda_config", "eva_config", "lora_ga_config"), None),
        "loftq_config": {},
    }


def _unlike(config: Mapping[str, Any], initial: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Yield what of an adapter is no B A that starts as what was taken out of the base."""
    for name in (name for name in _OF_RANK if config.get(name)):
        message = f"the adapter has `{name}`, with which no init of PEFT's changes the base"
        yield Diagnostic("cannot-convert", message, help="load the folder over the base as it is")
    inits = dict.fromkeys(one.get("init_lora_weights", True) for one in (config, initial))
    for init in (init for init in inits if init in (False, "loftq")):
        message = (
            f"`init_lora_weights` is `{json.dumps(init)}`, which takes no B₀ A₀ out of the base"
        )
        yield Diagnostic("cannot-convert", message, help="load the folder over the base as it is")


def _faults(trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Iterator[Diagnostic]:
    for key in (key for key in trained if ".lora_A." in key or "_B" in key or "embedding_A" in key):
        if key not in start:
            message = f"the adapter before training has no `{key}`"
            yield Diagnostic("adapter-missing-tensor", message)
        elif start[key].shape != trained[key].shape:
            message = f"`{key}` was {tuple(start[key].shape)} before training"
            yield Diagnostic("adapter-shape", message)
