"""A folder's adapters on a model."""

from pathlib import Path
from typing import TypeVar

from torch import nn

from lora_fx.adapters.peft.folders import adapter_folders, local
from lora_fx.adapters.weights.clone import clone
from lora_fx.compiler.compile import compile, compiled_tree
from lora_fx.compiler.pipeline import Backend
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.artifact.layout import is_artifact
from lora_fx.runtime.artifact.read import Artifact
from lora_fx.runtime.methods.slots import restore_slots
from lora_fx.runtime.root import take_default
from lora_fx.runtime.saved_spec import frame_of, restore_arithmetic, slots_of
from lora_fx.spec import parse

Model = TypeVar("Model", bound=nn.Module)


def load(
    folder: str | Path,
    base: Model | None = None,
    *,
    backend: Backend | None = "inductor",
    is_trainable: bool = False,
    trust_cache: bool = False,
) -> Model:
    """Return `base` with the adapters of a folder: an artifact, or what `save_pretrained` wrote.

    Of an artifact, `base` is by default the model that it was made for. Adapters and settings are
    those of its spec, and so is what is trained. Its compiled code is called if this user's lora_fx
    wrote it on this machine or `trust_cache` is set, and if model, versions and processor are the
    same; else the model compiles when it first runs, and a warning says why.

    Of any other folder, PEFT's too, layer replication is that of the folder; where it holds a spec,
    so are its `compile` settings and each module's dropout and compute dtype, of which PEFT's
    config knows nothing. The adapter in the folder itself is named `default`, those below it by
    their folders; the first is active, or what `default` of the spec's `route` says. With `slots`
    in it, adapters that the spec does not name are in slots again.

    Raises LoraFxError as `compile` and `load_adapter` do, and if an artifact is damaged.
    """
    if is_artifact(Path(folder)):
        return _serve(Artifact.open(Path(folder)), base, backend, trust_cache)
    if base is None:
        message = f"`{folder}` holds adapters and no model"
        raise LoraFxError((Diagnostic("no-model", message, help="pass it: `base=model`"),))
    folders = adapter_folders(folder)
    frame = frame_of(local(folder), next(iter(folders.values())))
    model = compile(base, frame, backend=backend)
    route, own = slots_of(local(folder))
    in_slots = [name for name in folders if route is not None and name not in own]
    for name in (name for name in folders if name not in in_slots):
        model.load_adapter(folders[name], name, is_trainable)  # type: ignore[operator]
    if route is not None:
        restore_slots(model, route)
    for name in in_slots:
        model.load_adapter(folders[name], name)  # type: ignore[operator]
    restore_arithmetic(model, local(folder))
    take_default(model)
    return model


def _serve(
    artifact: Artifact, base: Model | None, backend: Backend | None, trust_cache: bool
) -> Model:
    tree = clone(base if base is not None else artifact.load_base(trust_cache))
    model = compiled_tree(tree, parse(artifact.spec), backend, artifact.adapters)
    if backend == "inductor":
        artifact.serve(model, trust_cache)
    return model  # type: ignore[return-value]
