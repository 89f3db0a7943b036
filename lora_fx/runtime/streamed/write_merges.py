"""Write what the merges of a spec say is to be saved."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_fx.adapters.peft.keys import adapter_tensors
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.plan import Plan
from lora_fx.runtime.methods.adapters import AdapterMethods, write_adapter
from lora_fx.runtime.progress import Report
from lora_fx.runtime.streamed.changes import changes_of, in_checkpoint
from lora_fx.runtime.streamed.mapped_model import MappedModel
from lora_fx.runtime.streamed.shards import Shard
from lora_fx.runtime.streamed.staging import staged
from lora_fx.runtime.streamed.stream import stream
from lora_fx.spec.spec import MergeSpec, Spec
from lora_fx.spec.together import together


def require_saves(spec: Spec, force: bool) -> None:
    """Raise LoraFxError if there is nothing to write, or something else where it is to go."""
    faults = []
    if not any(merge.save for merge in spec.merges):
        message, help = "no merge says where it is saved", 'write `save = "folder"` in a `merge`'
        span = spec.merges[0].span if spec.merges else None
        faults.append(Diagnostic("cannot-apply", message, span, help=help))
    places: dict[Path, MergeSpec] = {}
    for merge in (merge for merge in spec.merges if merge.save):
        there = Path(str(merge.save)).resolve()
        first = places.setdefault(there, merge)
        if first is not merge:
            message, other = f"two merges are saved in `{merge.save}`", ((first.span, "and this"),)
            faults.append(Diagnostic("duplicate-statement", message, merge.span, secondary=other))
        if there.is_file() or (there.exists() and any(there.iterdir()) and not force):
            message, help = f"`{merge.save}` is there already", "replace it: `--force`"
            help = "choose another place" if there.is_file() else f"{help}, or `force=True`"
            faults.append(Diagnostic("artifact-exists", message, merge.span, help=help))
        if merge.into_base and merge.save and spec.layers is not None:
            message = "a checkpoint of `layers` that are repeated or dropped cannot be written yet"
            help = "compile the spec, and call `save_pretrained` of what `merge_and_unload` returns"
            faults.append(Diagnostic("not-supported-yet", message, merge.span, help=help))
    if faults:
        raise LoraFxError(faults)


def require_whole(plan: Plan) -> None:
    """Raise LoraFxError if the spec packs what is to be merged into: that is made in memory."""
    faults = [
        Diagnostic(
            "not-supported-yet",
            "weights that the spec quantises cannot be merged into in a checkpoint yet",
            merge.span,
            help="leave `quantize` out, which merges into the weights as they are there, or "
            "compile the spec, and call `save_pretrained` of what `merge_and_unload` returns",
        )
        for merge in plan.spec.merges
        if merge.into_base and merge.dequantize and any(plan.dequantized.values())
    ]
    if faults:
        raise LoraFxError(faults)


def write_merges(
    model: AdapterMethods, spec: Spec, mapped: MappedModel, report: Report
) -> list[Path]:
    """Write every merge of a spec that says so; return the folders.

    An adapter is a PEFT folder. Of what goes into the base the checkpoint is streamed. Each folder
    appears when it is whole. Raises LoraFxError.
    """
    shards = mapped.shards
    stored = {name: one for shard in shards for name, one in shard.tensors.items()}
    saved = [merge for merge in spec.merges if merge.save]
    changes = {
        merge.name: in_checkpoint(changes_of(model, merge.name), mapped.parts, stored)
        for merge in saved
        if merge.into_base
    }
    for merge in saved:
        folder = Path(str(merge.save))
        try:
            if merge.into_base:
                dtype = getattr(torch, merge.dtype) if merge.dtype else None
                with staged(folder, _job(model, merge, shards)) as beside:
                    stream(shards, beside, changes[merge.name], dtype, report)
            else:
                report(f"writing {folder}", 0, 1)
                with together(folder) as beside:
                    plan = model.lora_fx_adapters[merge.name]
                    write_adapter(model, plan, beside, False, folder)
        except OSError as error:
            message, reason = f"`{folder}` cannot be written", error.strerror or str(error)
            help = "run it again: what is written already is kept" if merge.into_base else None
            fault = Diagnostic("unwritable-file", message, notes=(reason,), help=help)
            raise LoraFxError((fault,)) from error
    return [Path(str(merge.save)) for merge in saved]


def _job(model: AdapterMethods, merge: MergeSpec, shards: Sequence[Shard]) -> str:
    """Return what is equal for two runs that write the same."""
    digest = hashlib.sha256(repr(merge.dtype).encode())
    for shard in shards:
        there = shard.path.stat()
        known = (shard.path.resolve(), there.st_size, there.st_mtime_ns)
        digest.update(repr(known).encode())
    tensors: Mapping[str, torch.Tensor] = adapter_tensors(model, merge.name)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
