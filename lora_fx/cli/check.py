"""`lora-fx check`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.report import report
from lora_fx.diagnostics import LoraFxError


def check(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The .lora files.")],
) -> None:
    """Check the syntax and meaning of .lora files, without a model."""
    from lora_fx.spec import parse

    failed = False
    for spec in specs:
        try:
            parse(spec)
        except LoraFxError as error:
            report(error.diagnostics)
            failed = True
        else:
            print(f"ok {spec}")
    if failed:
        raise typer.Exit(1)
