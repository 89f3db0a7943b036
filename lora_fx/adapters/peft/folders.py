"""Where the adapters of a saved model lie: `default` in the folder itself, others below it."""

from pathlib import Path

from lora_fx.adapters.peft.write import CONFIG
from lora_fx.diagnostics import Diagnostic, LoraFxError


def local(model_id: str | Path) -> Path:
    """Return a local folder: the path itself, or the downloaded adapter files of a hub id."""
    path = Path(model_id)
    if path.exists() or isinstance(model_id, Path):
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_id, allow_patterns=["adapter_*", "*.lora"]))


def adapter_folders(model_id: str | Path) -> dict[str, Path]:
    """Return every adapter's folder by name. Raises LoraFxError if there is none."""
    folder = local(model_id)
    found = {"default": folder} if (folder / CONFIG).exists() else {}
    found |= {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if not found:
        message = f"`{folder}` holds no adapter: neither it nor a folder below has `{CONFIG}`"
        raise LoraFxError((Diagnostic("no-adapter", message, None),))
    return found
