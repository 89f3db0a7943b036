"""`lora-fx explain`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from lora_fx.cli.show import ModelOption
from lora_fx.diagnostics.pages import Page, codes, page

_WIDTH = 100


def explain(
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE|SPEC", help="What stands in the brackets of an error; or a .lora file."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(metavar="MODULE", help="With a spec: a module of the model, by its name."),
    ] = None,
    model: ModelOption = None,
) -> None:
    """Explain a diagnostic code, or what a spec does to one module and which line says so.

    Without an argument, list all codes.
    """
    if subject is None:
        _print_codes()
    elif name is not None:
        from lora_fx.cli.explain_module import explain_module

        explain_module(Path(subject), name, model)
    elif subject.endswith((".lora", ".json")):
        raise typer.BadParameter("name a module of the model too: `lora-fx explain SPEC MODULE`")
    else:
        _print_page(_page(subject))


def _page(code: str) -> Page:
    """Return the page of a code, also as it is shown: `error[code]`."""
    bare = code.rpartition("[")[2].removesuffix("]")
    if bare in codes():
        return page(bare)
    from lora_fx.spec.closest import did_you_mean

    help = did_you_mean(bare, codes()) or "`lora-fx explain` lists them all"
    raise typer.BadParameter(f"there is no diagnostic `{bare}`; {help}")


def _print_codes() -> None:
    console = Console(soft_wrap=True, highlight=False)
    width = max(map(len, codes()))
    for explained in map(page, codes()):
        console.print(Text.assemble((f"{explained.code:<{width}}  ", "bold"), explained.summary))


def _print_page(explained: Page) -> None:
    """Print Markdown as a terminal shows it; where there is none, as it is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        encoding = sys.stdout.encoding or "utf-8"
        print(explained.text.encode(encoding, "replace").decode(encoding), end="")
        return
    from lora_fx.cli.page_markdown import PageMarkdown

    console.print(PageMarkdown(explained.text), width=min(console.width, _WIDTH))
