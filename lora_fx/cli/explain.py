"""`lora-fx explain`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from lora_fx.diagnostics import Diagnostic, LoraFxError
from lora_fx.diagnostics.pages import Page, codes, page
from lora_fx.spec.closest import did_you_mean

_WIDTH = 100


def explain(
    code: Annotated[
        str | None, typer.Argument(metavar="CODE", help="What stands in an error's brackets.")
    ] = None,
) -> None:
    """Explain a diagnostic code, with a wrong and a right example; without one, list them all."""
    if code is None:
        _print_codes()
    elif code in codes():
        _print_page(page(code))
    else:
        message = f"there is no diagnostic `{code}`"
        raise LoraFxError([Diagnostic("unknown-code", message, help=did_you_mean(code, codes()))])


def _print_codes() -> None:
    console = Console(soft_wrap=True, highlight=False)
    width = max(len(code) for code in codes())
    for explained in map(page, codes()):
        line = Text.assemble((f"{explained.code:<{width}}", "bold"), "  ", explained.summary)
        console.print(line)


def _print_page(explained: Page) -> None:
    """Markdown as a terminal shows it; where there is none, as it is."""
    console = Console(highlight=False)
    if not console.is_terminal:
        print(explained.text, end="")
        return
    heading, _, body = explained.text.partition("\n")
    console.print(Text(heading.removeprefix("# "), "bold"))
    width = min(console.width, _WIDTH)
    console.print(Markdown(body, code_theme="ansi_dark"), width=width)
