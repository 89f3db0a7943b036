"""Where the adapters of a saved model lie: `default` in the folder itself, others below it."""

from pathlib import Path

from lora_fx.adapters.peft.write import CONFIG
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.hub import is_hub_id, out_of_reach
from lora_fx.spec.together import finish


def local(model_id: str | Path) -> Path:
    """Return a local folder: the path itself, or the downloaded adapter files of a hub id.

    A save that was cut off when all was written is finished first. Raises LoraFxError if there is
    neither.
    """
    path = Path(model_id)
    if path.exists():
        _finish(path)
        return path
    if isinstance(model_id, Path) or "/" not in model_id or not is_hub_id(model_id):
        raise _no_adapter(f"there is no folder `{path}`")
    from huggingface_hub import snapshot_download

    away = out_of_reach(model_id, CONFIG)
    files = ["adapter_*", "*.lora"]
    try:
        folder = snapshot_download(
            model_id, allow_patterns=files, local_files_only=away is not None
        )
    except (OSError, ValueError) as error:
        if away is not None:
            message = f"`{model_id}` is no folder, not in the cache, and the hub does not answer"
            raise _no_adapter(message, away) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _no_adapter(f"`{model_id}` is neither a folder nor a hub id", reason) from error
    return Path(folder)


def adapter_folders(model_id: str | Path) -> dict[str, Path]:
    """Return every adapter's folder by name. Raises LoraFxError if there is none.

    Hidden folders are none: a save that was killed leaves one.
    """
    folder = local(model_id)
    found = {"default": folder} if (folder / CONFIG).exists() else {}
    below = (path.parent for path in sorted(folder.glob(f"*/{CONFIG}")))
    found |= {path.name: path for path in below if not path.name.startswith(".")}
    if not found:
        message = f"`{folder}` holds no adapter: neither it nor a folder below has `{CONFIG}`"
        raise _no_adapter(message)
    return found


def _finish(folder: Path) -> None:
    try:
        for place in (folder, folder.parent):
            finish(place)
    except OSError as error:
        message = f"a save into `{folder}` was cut off, and cannot be finished from here"
        reason = error.strerror or str(error)
        raise LoraFxError((Diagnostic("adapter-unreadable", message, notes=(reason,)),)) from error


def _no_adapter(message: str, *notes: str) -> LoraFxError:
    return LoraFxError((Diagnostic("no-adapter", message, notes=notes),))
