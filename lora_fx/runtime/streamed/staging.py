"""A folder that is filled over several runs, and appears when it is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_fx.spec.whole_folder import sync, take_the_place

_JOB = ".job"


@contextmanager
def staged(folder: Path, job: str) -> Iterator[Path]:
    """Give a folder beside `folder`, which takes its place when the block ends.

    If the process ends before, what was written stays and is given again to who comes with the
    same `job`; what another left is removed. If the block fails with anything but OSError or an
    interruption, nothing stays. Raises OSError.
    """
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}-merging")
    if not (beside / _JOB).exists() or (beside / _JOB).read_text() != job:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / _JOB).write_text(job)
    try:
        yield beside
    except (OSError, KeyboardInterrupt):
        raise
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    (beside / _JOB).unlink()
    sync(beside)
    take_the_place(beside, folder)
    shutil.rmtree(beside, ignore_errors=True)


def put(path: Path, written: Path) -> None:
    """Give a file that is whole its name."""
    os.replace(written, path)
