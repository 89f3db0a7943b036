"""What Inductor keeps of compiled code in its own cache folder, taken along.

The folder is that of `TORCHINDUCTOR_CACHE_DIR`; its files are named by the hash of what they were
made from, so that what stands there already is the same. `torch.compiler.save_cache_artifacts`
would leave out the shared libraries, which are most of the time that a start takes on a CPU.

Relies on `torch._inductor.utils.clear_caches` and `cache_dir`; `tests/runtime/artifact` holds what
is used of them.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.runtime.artifact.layout import files_below

_NOT_TAKEN = ("locks", "precompiled_headers")


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Let Inductor keep what it compiles inside the block in `folder`, and find nothing there."""
    from torch._inductor.utils import clear_caches

    places = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    before = {name: os.environ.pop(name, None) for name in places}
    clear_caches()
    os.environ.update(places)
    try:
        yield
    finally:
        clear_caches()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    for name in _NOT_TAKEN:
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in files_below(folder):
        if path.suffix == ".lock":
            path.unlink()


def put_in_place(files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Put files, by their path in the folder, where Inductor looks for them; return where."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    place = Path(cache_dir())
    paths = []
    for name, data in files:
        path = place / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, data)
        paths.append(path)
    return paths


def _write(path: Path, data: bytes) -> None:
    """Write a file that others may be writing too: they write the same."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    beside.chmod(0o755 if path.suffix == ".so" else 0o644)
    os.replace(beside, path)
