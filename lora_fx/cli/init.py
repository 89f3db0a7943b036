"""`lora-fx init`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lora_fx.diagnostics import Diagnostic, LoraFxError


def init(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The model it is for: a folder, a config.json or a hub id. No weights are read.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")] = Path(
        "spec.lora"
    ),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a first .lora file, for a model or for any; what else it may say is in comments."""
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} is there already; --force overwrites it")
    _write(out, _generic() if model is None else _for_model(model, out))
    print(f"wrote {out}")
    with_model = "" if model else " --model PATH"
    print(f"next: lora-fx plan {out}{with_model}   # which module gets what, and what it takes")


def _generic() -> str:
    from lora_fx.spec.starter import starter_text

    return starter_text(None, None)


def _for_model(model: str, out: Path) -> str:
    """Return the file for a model; the bound of its check is that of its own plan."""
    with Console(stderr=True).status("Reading the model"):
        from lora_fx.plan.outline import outline_of
        from lora_fx.plan.plan import plan_sites
        from lora_fx.plan.skeleton import tree_of
        from lora_fx.spec import parse
        from lora_fx.spec.starter import starter_text

        tree = tree_of(model, parse("lora 1\n"))
        outline, named = outline_of(tree), _from(out.parent, model)
        plan = plan_sites(parse(starter_text(outline, named, share=1.0)), tree)
        return starter_text(outline, named, plan.trainable / plan.all)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"`{out}` cannot be written"
        raise LoraFxError([Diagnostic("unwritable-file", message, notes=(reason,))]) from error


def _from(folder: Path, model: str) -> str:
    """Return the model as a file in a folder names it."""
    if not Path(model).exists() or Path(model).is_absolute():
        return model
    return Path(os.path.relpath(model, folder)).as_posix()
