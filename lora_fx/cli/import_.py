"""`lora-fx import`."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="An adapter_config.json of PEFT, or its folder."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The model it is for: a folder, a config.json or a hub id. With it the file says "
            "just what PEFT does to that model.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; without it, stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a PEFT LoRA config as a .lora file."""
    text = _text(config, model)
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise typer.BadParameter(f"{out} is there already; --force overwrites it") from None
    print(f"wrote {out}")


def _text(config: Path, model: str | None) -> str:
    """Return the text; torch is loaded only if the model matters."""
    from lora_fx.spec.peft.read import read_config
    from lora_fx.spec.peft.text import to_text

    given = read_config(config)
    if model is None and not given.asks_for_its_model:
        return to_text(given)
    from lora_fx.plan.peft import peft_text

    return peft_text(given, model)
