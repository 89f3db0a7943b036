"""Files of tensors, read and written piece by piece.

A safetensors file is the length of its header (8 bytes, little endian), the header, JSON that says
of each tensor its dtype, shape and the bytes where it lies behind the header, and these bytes.
https://huggingface.co/docs/safetensors
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 1 << 22  # bytes that are read at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the name of its dtype there, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def floating(self) -> torch.dtype | None:
        """Its dtype, if that is one that weights are computed in; None for packed ones."""
        return _DTYPES.get(self.dtype)

    def as_dtype(self, dtype: torch.dtype | None) -> "Stored":
        """Return what it is in another floating dtype, `start` and `end` as if it lay first."""
        wanted = self.floating if dtype is None or self.floating is None else dtype
        if wanted is None:
            return Stored(self.dtype, self.shape, 0, self.end - self.start)
        size = torch.Size(self.shape).numel() * wanted.itemsize
        return Stored(_NAMES[wanted], self.shape, 0, size)


@dataclass(frozen=True)
class Shard:
    """One file: its tensors by name, in the order of their bytes, and its metadata."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read the header. Raises ValueError for what is no such file, or a part of one."""
        whole = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else whole
            if 8 + length > whole:
                raise ValueError("it is cut off, or no safetensors file")
            header: dict[str, Any] = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        first = 8 + length
        tensors = {
            name: Stored(
                one["dtype"], tuple(one["shape"]), *(first + n for n in one["data_offsets"])
            )
            for name, one in header.items()
        }
        if max((one.end for one in tensors.values()), default=first) != whole:
            raise ValueError("it is cut off")
        return cls(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata)

    def read(self, name: str) -> Tensor:
        """Read one tensor of a floating dtype into memory of its own."""
        stored = self.tensors[name]
        assert stored.floating is not None
        tensor = torch.empty(stored.shape, dtype=stored.floating)
        with self.path.open("rb") as file:
            file.seek(stored.start)
            _fill(tensor, file)
        return tensor

    def rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read some rows of a tensor at a time; yields where they begin, and them.

        They lie where those before the last did.
        """
        stored = self.tensors[name]
        assert stored.floating is not None
        count, *row = stored.shape
        size = torch.Size(row).numel() * stored.floating.itemsize
        step = min(count, max(1, _PIECE // max(1, size)))
        places = [torch.empty((step, *row), dtype=stored.floating) for _ in range(2)]
        with self.path.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, count, max(1, step)):
                rows = places[0][: count - start]
                _fill(rows, file)
                yield start, rows
                places.reverse()

    def copy(self, name: str, into: BinaryIO) -> None:
        """Write a tensor's bytes into another file."""
        stored = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(stored.start)
            for place in range(stored.start, stored.end, _PIECE):
                into.write(file.read(min(_PIECE, stored.end - place)))


def _fill(tensor: Tensor, file: BinaryIO) -> None:
    """Read the tensor that comes next in a file. Raises OSError if the file ends before it."""
    if tensor.numel():
        data = tensor.view(-1).view(torch.uint8).numpy()
        if file.readinto(data) < data.nbytes:  # type: ignore[attr-defined]
            raise OSError(f"`{file.name}` has been cut off")


def begin(file: BinaryIO, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write the header of a file that will hold these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, one in tensors.items():
        end = place + one.end - one.start
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def append(file: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of a tensor behind what is there."""
    if tensor.numel():
        data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        file.write(data)


def written_behind(file: BinaryIO, tensors: Iterable[Tensor]) -> None:
    """Write tensors one behind the other, each while the next is made, and none longer."""
    with ThreadPoolExecutor(1) as writer:
        before: Future[None] | None = None
        for tensor in tensors:
            if before is not None:
                before.result()
            before = writer.submit(append, file, tensor)
        if before is not None:
            before.result()


def durable(file: BinaryIO) -> None:
    """Have what was written on the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def shards_in(folder: Path) -> Iterator[Shard]:
    """Yield the files of tensors that a checkpoint consists of: those of its index, or the one."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        yield Shard.open(folder / name)
