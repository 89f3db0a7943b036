"""Which compiled code may run: what this user's lora_fx wrote, known by its hash.

The hashes are kept one a line in a file of the user's own cache folder. A file that somebody else
may write says nothing.
"""

import os
import stat
from pathlib import Path

from lora_fx.spec.user_cache import user_cache

_NAME = "trusted_artifacts"


def trust(digest: str) -> bool:
    """Let code with this hash run from now on; False if that cannot be kept."""
    try:
        path = _path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not _is_private(path):
            path.unlink()
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(file, "a", encoding="ascii") as lines:
            lines.write(f"{digest}\n")
    except (OSError, RuntimeError):
        return False
    return True


def is_trusted(digest: str) -> bool:
    """Whether code with this hash may run."""
    try:
        path = _path()
        return _is_private(path) and digest in path.read_text(encoding="ascii").split()
    except (OSError, RuntimeError, ValueError):
        return False


def _path() -> Path:
    return user_cache() / _NAME


def _is_private(path: Path) -> bool:
    """Whether it is the user's own file, and no link, that nobody else may read or write."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return False
    return os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
