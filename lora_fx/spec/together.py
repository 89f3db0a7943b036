"""Several files of one folder that change together, whatever else lies there.

They are written into a folder of their own inside. Renaming that to `.lora_fx-saved` is the moment
at which the new files hold: from then on they are moved out, and if the process is killed before
the last one is, whoever reads or writes here next finishes it. A system cannot rename two files at
once, so a reader that does not know about this can, within that moment, see some old and some new.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lora_fx.spec.whole_folder import missing_folders, remove_empty, sync, whole_folder

_SAVED = ".lora_fx-saved"
_OLD = ".old"


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; when the block ends, its files are in `folder`.

    They take the places of those that have their names; a new folder appears with all of them. If
    the block fails, or anything after it, `folder` is as before. Raises OSError.
    """
    if not folder.exists():
        with whole_folder(folder) as beside:
            yield beside
        return
    finish(folder)
    inside = folder / f".saving-{uuid4().hex[:12]}"
    try:
        inside.mkdir()
        yield inside
        sync(inside)
        _move(inside, folder)
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def finish(folder: Path) -> None:
    """Move into place what a process that was killed has left to move. Raises OSError."""
    saved = folder / _SAVED
    if saved.is_dir():
        _move_out(saved, folder, _files(saved))
        shutil.rmtree(saved, ignore_errors=True)


def _move(inside: Path, folder: Path) -> None:
    files, saved = _files(inside), folder / _SAVED
    made = [one for name in files for one in missing_folders((folder / name).parent)]
    try:
        for name in files:
            _keep(folder / name, inside / _OLD / name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.rename(inside, saved)
        _move_out(saved, folder, files)
    except BaseException:
        if not inside.exists():
            _move_back(saved, folder, files)
            shutil.rmtree(saved, ignore_errors=True)
        remove_empty(made)
        raise
    shutil.rmtree(saved, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """Return the new files, relative to the folder that they were written into."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in found if name.parts[0] != _OLD]


def _keep(path: Path, kept: Path) -> None:
    """Have a second name for a file that is there."""
    if not path.exists():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, kept)
    except OSError:  # a file system without hard links
        shutil.copy2(path, kept)


def _move_out(saved: Path, folder: Path, files: list[Path]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # somebody else has finished this save
            os.replace(saved / name, folder / name)


def _move_back(saved: Path, folder: Path, files: list[Path]) -> None:
    for name in files:
        if (saved / _OLD / name).exists():
            os.replace(saved / _OLD / name, folder / name)
        elif not (saved / name).exists():
            (folder / name).unlink(missing_ok=True)
