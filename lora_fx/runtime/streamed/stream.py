"""Write a checkpoint anew with some of its tensors changed: one tensor in memory at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.folding import numberless
from lora_fx.runtime.merging.tensors import are_finite
from lora_fx.runtime.progress import Report
from lora_fx.runtime.streamed.changes import Change
from lora_fx.runtime.streamed.shards import Shard, begin, durable, written_behind
from lora_fx.runtime.streamed.staging import put

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX = "model.safetensors.index.json"


def stream(
    shards: Sequence[Shard],
    folder: Path,
    changes: Mapping[str, Change],
    dtype: torch.dtype | None,
    report: Report,
) -> None:
    """Write the checkpoint that `shards` are of into `folder`; shards that are there stay.

    Floating tensors are cast to `dtype` if one is given. Raises LoraFxError for a result that is
    not finite.
    """
    done, of = 0, sum(len(shard.tensors) for shard in shards)
    for shard in shards:
        if not (folder / shard.path.name).exists():
            for number in _write(shard, folder, changes, dtype):
                report(f"merging {shard.path.name}", done + number, of)
        done += len(shard.tensors)
    _copy_others(shards[0].path.parent, folder, shards, dtype)


def _write(
    shard: Shard, folder: Path, changes: Mapping[str, Change], dtype: torch.dtype | None
) -> Iterator[int]:
    """Write one shard anew; yields, of each tensor that is written, the number of it."""
    part = folder / f"{shard.path.name}.part"
    results = {name: stored.as_dtype(dtype) for name, stored in shard.tensors.items()}
    with part.open("wb") as file:
        begin(file, results, shard.metadata)
        for number, (name, stored) in enumerate(shard.tensors.items()):
            if name not in changes and results[name].dtype == stored.dtype:
                shard.copy(name, file)
            else:
                wanted = results[name].floating
                written_behind(file, _new(shard, name, changes.get(name), wanted))
            yield number + 1
        durable(file)
    put(folder / shard.path.name, part)


def _new(
    shard: Shard, name: str, change: Change | None, dtype: torch.dtype | None
) -> Iterator[Tensor]:
    """Yield what becomes of a tensor: all of it, or some rows at a time."""
    if change is None:
        yield shard.read(name).to(dtype)
        return
    for values in _changed(shard, name, change):
        merged = values.to(dtype)
        if not all(are_finite([merged])):
            message = f"merged, `{numberless(name)}` would hold NaN or infinity"
            help = "look for the adapter whose values are not finite, or set a wider `dtype`"
            raise LoraFxError((Diagnostic("merge-not-finite", message, help=help),))
        yield merged


def _changed(shard: Shard, name: str, change: Change) -> Iterator[Tensor]:
    if change.has_rows:
        for start, rows in shard.rows(name):
            yield change.of_rows(rows, start)
    else:
        yield change(shard.read(name))


def _copy_others(
    source: Path, folder: Path, shards: Sequence[Shard], dtype: torch.dtype | None
) -> None:
    """Copy what else belongs to the model; config and index say the new dtype and size."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if (folder / _INDEX).exists():
        index = json.loads((folder / _INDEX).read_text())
        sizes = (one.as_dtype(dtype).end for shard in shards for one in shard.tensors.values())
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
