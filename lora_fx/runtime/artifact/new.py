"""The folder of a new artifact: there when it is whole, and only where nothing else is lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.runtime.artifact.layout import is_artifact
from lora_fx.spec.whole_folder import whole_folder


@contextmanager
def new_artifact(folder: Path, force: bool) -> Iterator[Path]:
    """Give a folder to write an artifact into; when the block ends it is at `folder`.

    Whenever the process is killed, there is the artifact that was there before or the new one.
    Raises LoraFxError if there is an artifact and not `force`, or anything else, or if it cannot be
    written.
    """
    _require_free(folder, force)
    try:
        with whole_folder(folder) as beside:
            yield beside
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"`{folder}` cannot be written"
        diagnostic = Diagnostic("unwritable-file", message, notes=(reason,))
        raise LoraFxError((diagnostic,)) from error


def _require_free(folder: Path, force: bool) -> None:
    if is_artifact(folder):
        message, help = (
            f"`{folder}` is an artifact already",
            "replace it: `--force`, or `force=True`",
        )
        fault = None if force else Diagnostic("artifact-exists", message, help=help)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message, help = f"`{folder}` is there, and is no artifact", "choose another place"
        fault = Diagnostic("artifact-exists", message, help=help)
    else:
        fault = None
    if fault is not None:
        raise LoraFxError((fault,))
