"""Folders that appear whole, in the place of another or of none."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_HERE = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to write into, which takes the place of `folder` when the block ends.

    It lies beside `folder`. Whoever looks there, whenever this process is killed, finds the old
    folder or the new one; if the block fails, the old one. Where the system cannot exchange two
    folders (none but Linux can), there is a moment with neither. Raises OSError.
    """
    folder = folder.resolve()
    made = missing_folders(folder.parent)
    beside = folder.with_name(f".{folder.name}-{uuid4().hex[:12]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        yield beside
        sync(beside)
        take_the_place(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        remove_empty(made)
        raise
    shutil.rmtree(beside, ignore_errors=True)


def missing_folders(folder: Path) -> list[Path]:
    """Return those that would have to be made for a folder to be there, the innermost first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing; those with something in them stay."""
    for folder in sorted(set(folders), key=lambda one: len(one.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def sync(folder: Path) -> None:
    """Have all of a folder on the disk itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        else:
            sync_names(path)
    sync_names(folder)


def sync_names(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can be asked for that."""
    if os.name != "posix":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def take_the_place(new: Path, old: Path) -> None:
    """Have `new` at `old`, and what was there, if anything, at `new`; or, if it fails, neither."""
    move = _exchange if old.exists() else os.rename
    move(new, old)
    try:
        sync_names(old.parent)
    except BaseException:
        move(old, new)
        raise


def _exchange(new: Path, old: Path) -> None:
    if sys.platform == "linux" and _renameat2(new, old) == 0:
        return
    aside = old.with_name(f"{new.name}-old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
        os.rename(aside, new)
    except BaseException:
        if not new.exists():
            os.rename(old, new)
        os.rename(aside, old)
        raise


def _renameat2(new: Path, old: Path) -> int:
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return -1
    return exchange(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _EXCHANGE)
