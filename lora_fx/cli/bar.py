"""The bar that long work moves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr, where that is a terminal; gives the function that moves it.

    Meanwhile transformers shows none of its own.
    """
    from transformers.utils import logging

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    theirs = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with shown:
            task = shown.add_task("starting", total=None)
            yield lambda step, done, of: shown.update(
                task, description=step, completed=done, total=of
            )
    finally:
        if theirs:
            logging.enable_progress_bar()
