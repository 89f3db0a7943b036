"""The user's own folder, for what lora_fx keeps between processes."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return `LORA_FX_CACHE`, else `lora_fx` in `XDG_CACHE_HOME` or `~/.cache`; it may not exist.

    Raises RuntimeError if there is no home.
    """
    own = os.environ.get("LORA_FX_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(shared) / "lora_fx").expanduser()
