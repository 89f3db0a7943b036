"""`lora-fx compile`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.report import report
from lora_fx.cli.show import SpecArgument
from lora_fx.runtime.progress import progress_bar


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
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text, for inits that look at data."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact.")] = False,
) -> None:
    """Write what is known ahead of training, compiled code too, for `lora_fx.load(DIR)`.

    Compiled ahead is each `entry` of the spec, for its sizes, on the GPU if there is one. The
    folder appears when it is whole.
    """
    with _only_our_bars(), progress_bar() as step:
        from lora_fx.compiler.build import build

        plan = build(spec, model, out, force=force, calibration=calibration, report=step)
    report(plan.notes)
    entries = ", ".join(f"`entry {entry.name}`" for entry in plan.spec.compile.entries)
    ahead = f"compiled ahead: {entries}" if entries else "nothing compiled: the spec has no `entry`"
    print(f"wrote {out} ({ahead})")


@contextmanager
def _only_our_bars() -> Iterator[None]:
    """Let transformers show no progress bars meanwhile."""
    from transformers.utils import logging

    theirs = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if theirs:
            logging.enable_progress_bar()
