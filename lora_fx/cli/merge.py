"""`lora-fx merge`."""

from typing import Annotated

import typer

from lora_fx.cli.show import SpecArgument
from lora_fx.runtime.progress import progress_bar


def merge(
    spec: SpecArgument,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder with weights or a hub id; without it, the model that the spec names.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Carry out the merges of a spec and write those that say `save`.

    What goes into the base is streamed: one tensor of the checkpoint is in memory at a time. A run
    that was cut off goes on where it was. Each folder appears when it is whole.
    """
    with progress_bar() as step:
        from lora_fx.compiler.merge import merge

        folders = merge(spec, model, force=force, report=step)
    for folder in folders:
        print(f"wrote {folder}")
