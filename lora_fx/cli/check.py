"""`lora-fx check`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lora_fx.cli.report import report
from lora_fx.diagnostics import Diagnostic, LoraFxError


def check(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The .lora files.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is wrong as one JSON document, to stdout.")
    ] = False,
    as_sarif: Annotated[
        bool, typer.Option("--sarif", help="Print it as SARIF 2.1.0, for code scanning.")
    ] = False,
) -> None:
    """Check the syntax and meaning of .lora files, without a model."""
    if as_json and as_sarif:
        raise typer.BadParameter("--json and --sarif are two formats; choose one")
    faults: list[Diagnostic] = []
    for spec in specs:
        here = _faults(spec)
        faults += here
        if not here and not as_json and not as_sarif:
            print(f"ok {spec}")
    if as_json:
        from lora_fx.diagnostics import to_json

        print(json.dumps(to_json(faults), indent=2))
    elif as_sarif:
        from lora_fx.diagnostics import to_sarif

        print(json.dumps(to_sarif(faults), indent=2))
    else:
        report(faults)
    if faults:
        raise typer.Exit(1)


def _faults(spec: Path) -> tuple[Diagnostic, ...]:
    from lora_fx.spec import parse

    try:
        parse(spec)
    except LoraFxError as error:
        return error.diagnostics
    return ()
