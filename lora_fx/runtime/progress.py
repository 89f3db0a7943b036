"""What long work is at, on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar() -> Iterator[Report]:
    """Show a bar on stderr, where that is a terminal, from the first report on; it goes at the end.

    Gives the function that moves it: it hears what is being done, and how many steps of how many
    are.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("starting", total=None)

    def report(step: str, done: int, of: int) -> None:
        bar.start()
        bar.update(task, description=step, completed=done, total=of)

    try:
        yield report
    finally:
        bar.stop()


def silent(step: str, done: int, of: int) -> None:
    """Hear a report and show nothing."""
