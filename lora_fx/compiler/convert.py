"""A PEFT folder of plain LoRA from an adapter of any kind, or from a model trained whole."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_fx.adapters import storage
from lora_fx.adapters.combine.low_rank import Rank, is_rank
from lora_fx.adapters.peft.write import CONFIG
from lora_fx.adapters.weights import copies
from lora_fx.compiler.compile import compile
from lora_fx.compiler.load import load
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.artifact.base import load_model, place_of
from lora_fx.runtime.difference import Difference
from lora_fx.runtime.progress import Report, silent
from lora_fx.spec import parse
from lora_fx.spec.together import together

Source = nn.Module | str | Path


def convert(
    source: Source,
    base: Source,
    rank: Rank,
    out: str | Path = "converted",
    *,
    report: Report = silent,
) -> dict[str, float]:
    """Write what an adapter, or training all of a model, did to `base` as LoRA of a rank.

    `source` is a folder with a PEFT adapter of any kind, or a model of the base's architecture, a
    folder or a hub id of one. At each linear layer and convolution the factors are the best of
    their rank for the change, with the scaling 1; a `rank` between 0 and 1 is the share of Σ σ²
    that is kept. Whatever else a trained model has of its own, embeddings, norms, biases, tied
    weights, is kept whole (PEFT's `modules_to_save` and `bias`). Returns the error ‖Δ − B A‖ / ‖Δ‖
    of each site: rounding, where the rank suffices. The folder appears when it is whole. Raises
    LoraFxError, with nothing written.
    """
    if not is_rank(rank):
        message = f"`{rank}` is no rank; it is a whole number from 1, or a share up to 1.0"
        raise LoraFxError((Diagnostic("cannot-convert", message),))
    report("loading the models", 0, 2)
    model = _loaded(base)
    if not isinstance(source, nn.Module) and (Path(source) / CONFIG).exists():
        compiled, errors = _of_adapter(Path(source), model, rank)
    else:
        report("loading the models", 1, 2)
        compiled, errors = _of_model(_loaded(source), model, rank)
    with together(Path(out)) as beside:
        compiled._write_adapters(beside, Path(out), False)
    return errors


def _loaded(source: Source) -> nn.Module:
    if isinstance(source, nn.Module):
        return source
    return load_model(place_of(source, parse("lora 1")), "cpu")


def _of_adapter(folder: Path, base: nn.Module, rank: Rank) -> tuple[Any, dict[str, float]]:
    model: Any = load(folder, base, backend=None)
    (name, *_) = model.lora_fx_adapters
    errors = model.convert_adapter(name, "converted", rank)
    for other in list(model.lora_fx_adapters):
        if other != "converted":
            model.delete_adapter(other)
    model.add_weighted_adapter(["converted"], [1.0], "default", "cat")
    model.delete_adapter("converted")
    return model, errors


@torch.no_grad()
def _of_model(tuned: nn.Module, base: nn.Module, rank: Rank) -> tuple[Any, dict[str, float]]:
    found = Difference.of(tuned, base, rank)
    model: Any = compile(base, found.spec(), backend=None)
    placed = dict(storage.sites(model))
    for fqn, change in found.changes.items():
        A, B, *_ = storage.tensors(placed[fqn], "default").values()
        A.copy_(change.A.reshape(A.shape))
        B.copy_(change.B.reshape(B.shape))
    for fqn, module in storage.base_modules(model, itself=True).items():
        if copies.has(module, "default"):
            for name, own in copies.tensors(module, "default").items():
                own.copy_(getattr(tuned.get_submodule(fqn), name))
    return model, {fqn: change.error for fqn, change in found.changes.items()}
