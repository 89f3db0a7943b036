"""Where the adapters of a saved model lie: `default` in the folder itself, others below it."""

from pathlib import Path

from lora_fx.adapters.peft.write import CONFIG
from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.plan.hub import is_hub_id, out_of_reach


def local(model_id: str | Path) -> Path:
    """Return a local folder: the path itself, or the downloaded adapter files of a hub id.

    Raises LoraFxError if there is neither.
    """
    path = Path(model_id)
    if path.exists():
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
    """Return every adapter's folder by name. Raises LoraFxError if there is none."""
    folder = local(model_id)
    found = {"default": folder} if (folder / CONFIG).exists() else {}
    found |= {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if not found:
        message = f"`{folder}` holds no adapter: neither it nor a folder below has `{CONFIG}`"
        raise _no_adapter(message)
    return found


def _no_adapter(message: str, *notes: str) -> LoraFxError:
    return LoraFxError((Diagnostic("no-adapter", message, notes=notes),))
