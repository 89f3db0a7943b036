"""`lora-fx convert`."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fx.runtime.progress import progress_bar


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder with a PEFT adapter, or a model that was trained whole.",
        ),
    ],
    model: Annotated[str, typer.Option(metavar="PATH", help="The base: a folder or a hub id.")],
    rank: Annotated[
        float, typer.Option(help="The rank, or below 1 the share of all squares that is kept.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
) -> None:
    """Write what an adapter, or training all of a model, did to a base as plain LoRA of a rank.

    Prints how far each module is from what it was made of.
    """
    with progress_bar() as step:
        from lora_fx.compiler.convert import convert

        whole = int(rank) if rank >= 1 and rank == int(rank) else rank
        errors = convert(source, model, whole, out, report=step)
    wide = max(map(len, errors), default=0)
    for fqn, error in errors.items():
        print(f"{fqn:{wide}}  {error:.2e}")
    print(f"wrote {out} (‖Δ − B A‖ / ‖Δ‖ of each module above)")
