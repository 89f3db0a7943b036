"""`lora-fx compile`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lora_fx.cli.report import report
from lora_fx.cli.show import SpecArgument


def compile(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder with weights or a hub id; without it, the model that the spec names.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
) -> None:
    """Write what is known ahead of training, compiled code too, for `lora_fx.load(DIR)`.

    Compiled ahead is each `entry` of the spec, for its sizes, on the GPU if there is one. The
    folder appears when it is whole.
    """
    with _bar() as step:
        from lora_fx.compiler import build

        plan = build(spec, model, out, force=force, report=step)
    report(plan.notes)
    entries = ", ".join(f"`entry {entry.name}`" for entry in plan.spec.compile.entries)
    ahead = f"compiled ahead: {entries}" if entries else "nothing compiled: the spec has no `entry`"
    print(f"wrote {out} ({ahead})")


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr, where that is a terminal; gives the function that moves it.

    Meanwhile transformers shows none of its own.
    """
    from transformers.utils import logging

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    theirs = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with bar:
            task = bar.add_task("starting", total=None)
            yield lambda step, done, of: bar.update(
                task, description=step, completed=done, total=of
            )
    finally:
        if theirs:
            logging.enable_progress_bar()
