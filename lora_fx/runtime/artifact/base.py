"""The model that an artifact is for: where it lies, and loading it from there."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source, Span
from lora_fx.plan.skeleton import build_on_meta, read_config
from lora_fx.spec.spec import ModelRef, Spec

Place = Mapping[str, Any]  # path, dtype, revision, trust_remote_code


def place_of(model: nn.Module | str | Path | None, spec: Spec) -> Place | None:
    """Return where a model lies and how it is loaded; None if nothing says so.

    `model` is a live model, a folder or a hub id; None is the model that the spec names.
    """
    ref = spec.model
    named = None if ref is None else _beside(Path(ref.span.source.name).parent, ref.path)
    live = getattr(getattr(model, "config", None), "_name_or_path", None)
    path = named if model is None else live if isinstance(model, nn.Module) else str(model)
    if not path:
        return None
    of_ref = ref is not None and path in (ref.path, named)
    dtype = str(model.dtype).removeprefix("torch.") if live else ref.dtype if ref else None  # type: ignore[union-attr]
    return {
        "path": path,
        "dtype": dtype,
        "revision": ref.revision if ref is not None and of_ref else None,
        "trust_remote_code": ref is not None and ref.trust_remote_code,
    }


def seen_from(place: Place | None, folder: Path) -> Place | None:
    """Return a place with its path relative to a folder, if it is a path at all."""
    if place is None or not Path(place["path"]).exists():
        return place
    relative = os.path.relpath(place["path"], folder.resolve())
    return {**place, "path": Path(relative).as_posix()}


def load_seen_from(place: Place | None, folder: Path, device: str) -> PreTrainedModel:
    """Load a model from where it lies as seen from an artifact. Raises LoraFxError."""
    if place is None:
        message = "the artifact does not say where its base model lies"
        raise LoraFxError((Diagnostic("no-model", message, help="pass it: `base=model`"),))
    return load_model({**place, "path": _beside(folder, place["path"])}, device)


def load_model(place: Place | None, device: str) -> PreTrainedModel:
    """Load a model, of the class that its config names. Raises LoraFxError if there is none."""
    if place is None:
        message, help = "the spec names no model, and none is given", 'write `model "path or id"`'
        raise LoraFxError((Diagnostic("no-model", message, help=f"{help}, or pass one"),))
    path, revision, trust = place["path"], place["revision"], place["trust_remote_code"]
    ref = ModelRef(path, place["dtype"], revision, trust, Span(Source(path, ""), 0, 0))
    if Path(path).is_file():
        message, help = f"`{path}` is a file, and has no weights", "give a folder or a hub id"
        raise LoraFxError((Diagnostic("no-model", message, help=help),))
    try:
        tree = build_on_meta(read_config(path, ref), ref)
    except LoraFxError as error:
        raise LoraFxError([replace(one, span=None) for one in error.diagnostics]) from error
    options = {"dtype": tree.dtype, "trust_remote_code": trust} | (
        {} if revision is None else {"revision": revision}
    )
    try:
        loaded = type(tree).from_pretrained(path, **options)  # type: ignore[operator]
    except Exception as error:  # whatever comes of files that are no checkpoint
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message, help = f"`{path}` has no weights that can be read", "give a folder or a hub id"
        diagnostic = Diagnostic("no-model", message, notes=(reason,), help=help)
        raise LoraFxError((diagnostic,)) from error
    return loaded.to(device)


def _beside(folder: Path, path: str) -> str:
    return str(folder / path) if (folder / path).exists() else path
