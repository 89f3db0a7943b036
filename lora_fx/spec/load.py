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
    try:
        return Source(str(path), path.read_text(encoding="utf-8-sig")), path
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        message = f"`{path}` cannot be read"
        raise LoraFxError((Diagnostic("unreadable-file", message, notes=(reason,)),)) from error
