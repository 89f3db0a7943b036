"""A `.lora` file, its text, or its JSON form, as a Source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source

_TEXT = "<text>"
_DATA = "<data>"


def load(spec: str | Path | Mapping[str, Any] | Source) -> tuple[Source, Path | None]:
    """Return the source, and its path if it is a file.

    A str that begins with `lora ` or has a line break is the text itself; a mapping, or a file
    whose name ends with `.json`, is the JSON form of one. Raises LoraFxError if the file cannot be
    read, or what it holds is not of that form.
    """
    if isinstance(spec, Source):
        return spec, None
    if isinstance(spec, Mapping):
        from lora_fx.spec.json_form.read import json_to_text

        return Source(_DATA, json_to_text(spec)), None
    if isinstance(spec, str) and ("\n" in spec or spec[:5] == "lora "):
        return Source(_TEXT, spec), None
    path = Path(spec)
    source = decode(read(path), str(path))
    if path.suffix == ".json":
        from lora_fx.spec.json_form.file import read_json
        from lora_fx.spec.json_form.read import json_to_text

        source = Source(f"{path} as .lora", json_to_text(read_json(source)))
    return source, path


def read(path: Path) -> bytes:
    """Return what a file holds. Raises LoraFxError if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from error


def decode(data: bytes, name: str) -> Source:
    """Return UTF-8 as text whose lines end with a line feed. Raises LoraFxError if it is not."""
    try:
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise _unreadable(name, error) from error
    return Source(name, text.replace("\r\n", "\n").replace("\r", "\n"))


def _unreadable(name: str, error: Exception) -> LoraFxError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return LoraFxError([Diagnostic("unreadable-file", f"`{name}` cannot be read", notes=(reason,))])
