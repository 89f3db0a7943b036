"""`lora-fx compile`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.bar import bar
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
    with bar() as step:
        from lora_fx.compiler import build

        plan = build(spec, model, out, force=force, report=step)
    report(plan.notes)
    entries = ", ".join(f"`entry {entry.name}`" for entry in plan.spec.compile.entries)
    ahead = f"compiled ahead: {entries}" if entries else "nothing compiled: the spec has no `entry`"
    print(f"wrote {out} ({ahead})")
