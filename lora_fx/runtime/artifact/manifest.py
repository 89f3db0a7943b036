"""`artifact.json`: what an artifact is, and the hash of every other file in it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.artifact.layout import CACHE, MANIFEST, SPEC, files_below

_FORM = 1


@dataclass(frozen=True)
class Function:
    """A compiled graph: its file, and the modes of a model in which it can be called."""

    file: str
    training: bool
    grad: bool


@dataclass(frozen=True)
class Manifest:
    """What an artifact is.

    `model` says where the base lies, None if that is not known; `device` is the kind of device it
    is compiled for. `key` is what the compiled code depends on, empty if there is none; `files` are
    the hashes, by path.
    """

    model: Mapping[str, Any] | None
    device: str
    key: Mapping[str, str]
    functions: tuple[Function, ...]
    files: Mapping[str, str]

    def code_digest(self) -> str:
        """Return a hash of all that can run: compiled code, what it is for, and where the base is.

        The base counts because its folder may hold code of its own.
        """
        code = {name: hash for name, hash in self.files.items() if _is_code(name)}
        return sha256(_text(asdict(self) | {"files": code}).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder that it describes."""
    text = _text({"artifact": _FORM} | asdict(manifest))
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file of an artifact but its manifest, by path."""
    return {
        path.relative_to(folder).as_posix(): _hash(path)
        for path in files_below(folder)
        if path != folder / MANIFEST
    }


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest, once every file is what it says.

    Raises LoraFxError naming each file that is damaged or missing.
    """
    manifest = _read(folder)
    faults = list(_faults(folder, manifest.files))
    if faults:
        raise LoraFxError(faults)
    return manifest


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        form = data.pop("artifact")
        if form == _FORM:
            functions = tuple(Function(**one) for one in data.pop("functions"))
            manifest = Manifest(**data | {"functions": functions})
            needed = {SPEC, *(function.file for function in functions)}
            if needed <= manifest.files.keys():
                return manifest
            raise ValueError(f"it has no hash of `{min(needed - manifest.files.keys())}`")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraFxError((damaged(path, f"{type(error).__name__}: {error}"),)) from error
    raise LoraFxError((damaged(path, f"it has form {form!r}, this version reads {_FORM}"),))


def _faults(folder: Path, files: Mapping[str, str]) -> Iterator[Diagnostic]:
    for name, hash in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            yield damaged(path, "it lies outside the artifact")
        elif not path.is_file():
            yield damaged(path, "it is missing")
        elif _hash(path) != hash:
            yield damaged(path, "it is not what the artifact was written with")


def damaged(path: Path, reason: str) -> Diagnostic:
    """Return what is said of a damaged file."""
    help = "write the artifact anew: `lora-fx compile`"
    return Diagnostic("artifact-damaged", f"`{path}` is damaged", None, notes=(reason,), help=help)


def _is_code(name: str) -> bool:
    return name.startswith(f"{CACHE}/")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True)
