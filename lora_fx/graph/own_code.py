"""A hash of the code that decides what is compiled: rules, passes, kernels, and what is traced."""

from functools import cache
from hashlib import sha256
from pathlib import Path

_PARTS = ("adapters", "compiler", "graph", "kernels", "passes", "rewrite", "rules", "runtime")


@cache
def own_code() -> str:
    """Return a hash of the sources of this package that compiled code may depend on."""
    package = Path(__file__).parent.parent
    digest = sha256()
    for part in _PARTS:
        place = package / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
