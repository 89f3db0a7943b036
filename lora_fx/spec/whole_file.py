"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it, with the permissions of the one it replaces.

    A new file is the user's alone. What stood there before stays if this raises OSError.
    """
    path = path.resolve()
    file, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(file, "wb") as beside:
            beside.write(data)
        if path.exists():
            shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
