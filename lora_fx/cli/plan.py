"""`lora-fx plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lora_fx.cli.report import report


def plan(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="The .lora file.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A folder, a config.json or a hub id; without it, the model that the spec names.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show which module gets what, and what it takes. Loads no weights."""
    from lora_fx.spec import parse

    parsed = parse(spec)
    with Console(stderr=True).status("Reading the model"):
        from lora_fx.plan import plan as plan_model

        planned = plan_model(parsed, model)
    report(planned.notes)
    if as_json:
        print(json.dumps(planned.to_json(), indent=2))
        return
    from lora_fx.cli.plan_table import print_plan

    print_plan(planned)
