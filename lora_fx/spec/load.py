"""A `.lora` file, or its text, as a Source."""

from pathlib import Path

from lora_fx.diagnostics import Diagnostic, LoraFxError, Source

_TEXT = "<text>"


def load(path_or_text: str | Path) -> tuple[Source, Path | None]:
    """Return the source, and its path if it is a file.

    A str that begins with `lora ` or has a line break is the text itself. Raises LoraFxError if
    the file cannot be read.
    """
    if isinstance(path_or_text, str) and ("\n" in path_or_text or path_or_text[:5] == "lora "):
        return Source(_TEXT, path_or_text), None
    path = Path(path_or_text)
    return decode(read(path), str(path)), path


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
